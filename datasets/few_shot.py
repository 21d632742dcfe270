"""Few-shot training data: k good images per category, each as 22 fixed variants (INP-Former, after RegAD)."""

import math
import random
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from common.errors import UserError
from datasets.records import ImageDataset, Record

_ROTATIONS = (-45, -33.75, -22.5, -11.25, 11.25, 22.5, 33.75, 45)  # degrees
_SIGNS = ((1, 1), (-1, 1), (-1, -1), (1, -1))  # of the (x, y) offset
_TRANSLATIONS = (0.2, 0.1)  # in half sides: a tenth and a twentieth of the image
_LUMINANCE = (0.299, 0.587, 0.114)  # ITU-R BT.601, as kornia


def choose_shots(records: list[Record], shot: int, seed: int, item: str) -> list[Record]:
    """`shot` random training images of one category, in the order drawn: fewer shots are the beginning of more.

    The choice depends on seed, item and file names alone, not on other categories or the order of `records`.

    Raises:
        UserError: there are fewer records than `shot`.
    """
    if shot > len(records):
        raise UserError(
            f"{item} has {len(records)} training images, fewer than --shot {shot}; give --shot {len(records)} or smaller"
        )
    generator = random.Random(f"{seed}/{item}")  # noqa: S311 - a repeatable draw, no secret
    by_name = sorted(records, key=lambda record: (record.path.name, record.path.as_posix()))
    # of a generator's methods only random() is promised to give the same numbers in every Python version
    return sorted(by_name, key=lambda record: generator.random())[:shot]


def _resampled(image: Tensor, matrix: list[list[float]]) -> Tensor:
    """Image (3, S, S) read bilinearly where a 2 x 3 matrix sends the output's (x, y, 1); mirrored beyond its border."""
    affine = torch.tensor([matrix], dtype=image.dtype)
    grid = F.affine_grid(affine, [1, *image.shape], align_corners=False)
    return F.grid_sample(image.unsqueeze(0), grid, mode="bilinear", padding_mode="reflection", align_corners=False)[0]


def _rotated(image: Tensor, degrees: float) -> Tensor:
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return _resampled(image, [[cosine, -sine, 0.0], [sine, cosine, 0.0]])


def _translated(image: Tensor, x: float, y: float) -> Tensor:
    return _resampled(image, [[1.0, 0.0, x], [0.0, 1.0, y]])


def _grey(image: Tensor) -> Tensor:
    weights = torch.tensor(_LUMINANCE, dtype=image.dtype)
    return (image * weights[:, None, None]).sum(dim=0, keepdim=True).repeat(3, 1, 1)


_VARIANTS = (
    torch.clone,
    *(partial(_rotated, degrees=degrees) for degrees in _ROTATIONS),
    *(partial(_translated, x=offset * x, y=offset * y) for offset in _TRANSLATIONS for x, y in _SIGNS),
    partial(torch.flip, dims=(2,)),
    _grey,
    *(partial(torch.rot90, k=quarters, dims=(1, 2)) for quarters in (1, 2, 3)),
)
DEFAULT_SHOT = 4
VARIANTS_PER_IMAGE = len(_VARIANTS)


def variant(image: Tensor, number: int) -> Tensor:
    """Variant 0 to 21 of a normalised square image (3, S, S) on the CPU, of the same shape and always the same.

    0 the image itself; 1-8 rotations by -45, -33.75, -22.5, -11.25, 11.25, 22.5, 33.75, 45 degrees; 9-16 translations by
    0.2, then 0.1 of half a side, with the signs (+, +), (-, +), (-, -), (+, -) of (x, y); 17 left-right flip;
    18 luminance in all channels, of the normalised values; 19-21 rotations by 90, 180, 270 degrees.

    As in the source: numbers and order, bilinear sampling, mirroring at the outer edge of the border pixels
    (align_corners false), and that an angle or offset applies to the positions read. Seen on the content, a positive
    angle turns anticlockwise, a positive offset moves left and up. Our choice: the right-angle rotations move pixels
    without resampling them, which equals the source's up to its rounding.
    """
    return _VARIANTS[number](image)


class FewShotDataset(Dataset):
    """All variants of a few good images: items, annotations and sizes as `ImageDataset`, 22 indices per image.

    Keeps each transformed image in memory once it was read (1.8 MB at 392 pixels, in every loader worker);
    variants are computed when asked for.
    """

    identity = {"augmentation": "few-shot-22", "version": 1}  # raise the version when a variant's numbers or place change

    def __init__(self, images: ImageDataset):
        self.images = images
        self.records = [record for record in images.records for _ in range(VARIANTS_PER_IMAGE)]
        self.input_size, self.crop_size = images.input_size, images.crop_size
        self._read: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.records)

    def image(self, index: int) -> Tensor:
        """One variant (3, crop, crop)."""
        source, number = divmod(index, VARIANTS_PER_IMAGE)
        if source not in self._read:
            self._read[source] = self.images.image(source)
        return variant(self._read[source], number)

    def annotations(self, index: int) -> dict:
        """As `ImageDataset.annotations`; all variants of an image have its path."""
        return self.images.annotations(index // VARIANTS_PER_IMAGE)

    def __getitem__(self, index: int) -> dict:
        return {"image": self.image(index), **self.annotations(index)}
