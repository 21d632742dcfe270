"""The one record type of all data sets, and the torch data set that reads it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from common.errors import UserError
from datasets.images import DEFAULT_MAX_PIXELS, image_size, load_image, load_mask
from datasets.transforms import Interpolation, image_transform, mask_transform


@dataclass(frozen=True)
class Record:
    """One image of a data set.

    Attributes:
        path: image file.
        label: 0 good, 1 defective.
        item: category.
        masks: mask files of a defective image (several are united); empty for a good image.
        kind: name of the defect kind (test folder or anomaly class); empty for a good image.
        has_pixel_truth: whether every pixel's label is known; false for a defective image without a mask.
    """

    path: Path
    label: int
    item: str
    masks: tuple[Path, ...] = ()
    kind: str = ""

    @property
    def has_pixel_truth(self) -> bool:
        return self.label == 0 or bool(self.masks)


@dataclass(frozen=True)
class DefectRegion:
    """One defect of an image, which may count as found before all of it is.

    Attributes:
        mask: (H, W) bool at the image's own size.
        saturation: pixels, at that size, from which on the region counts as fully found.
    """

    mask: np.ndarray
    saturation: float


def mask_size_differs(mask: Path, found: tuple[int, int], image: Path, expected: tuple[int, int]) -> str:
    """The sentence on a mask whose (width, height) is not its image's."""
    return (
        f"mask size differs: {str(mask)!r} is {found[0]}x{found[1]}, its image {str(image)!r} is "
        f"{expected[0]}x{expected[1]}; masks must be drawn on the image's own pixels"
    )


def check_mask_sizes(records: list[Record], max_pixels: int = DEFAULT_MAX_PIXELS) -> None:
    """Raise UserError for the first mask whose size is not its image's."""
    for record in records:
        for mask in record.masks:
            expected, found = image_size(record.path, max_pixels), image_size(mask, max_pixels)
            if expected != found:
                raise UserError(mask_size_differs(mask, found, record.path, expected))


class ImageDataset(Dataset):
    """Records as dict(image, mask, label, path, item, has_pixel_truth).

    image (3, crop, crop) float32 normalised; mask (1, crop, crop) float32 in 0..1, zeros where there is none.

    Attributes:
        resized: what `resized_image` gave for every index, to be read instead of the files; None to read the files.
        identity: what besides files, sizes and interpolation determines an image: nothing.
    """

    identity: dict = {}

    def __init__(
        self,
        records: list[Record],
        input_size: int,
        crop_size: int,
        max_pixels: int = DEFAULT_MAX_PIXELS,
        resized: Sequence[np.ndarray] | None = None,
        interpolation: Interpolation = "bilinear",
    ):
        self.records = records
        self.input_size, self.crop_size, self.max_pixels, self.resized = input_size, crop_size, max_pixels, resized
        self.interpolation = interpolation
        self._transform_image = image_transform(input_size, crop_size, interpolation)
        self._transform_mask = mask_transform(input_size, crop_size, interpolation)

    def __len__(self) -> int:
        return len(self.records)

    def image(self, index: int) -> Tensor:
        """Transformed image (3, crop, crop)."""
        if self.resized is not None:
            return self._transform_image(Image.fromarray(self.resized[index]))  # PIL resizes to the same size by copying
        return self._transform_image(load_image(self.records[index].path, self.max_pixels))

    def resized_image(self, index: int) -> np.ndarray:
        """Image (input, input, 3) uint8 as the transform resizes it: all that `image` needs of the file."""
        resize = self._transform_image.transforms[0]
        return np.array(resize(load_image(self.records[index].path, self.max_pixels)))

    def annotations(self, index: int) -> dict:
        """All of a record but its image."""
        record = self.records[index]
        mask = torch.zeros(1, self.crop_size, self.crop_size)
        for path in record.masks:
            mask = torch.maximum(mask, self._transform_mask(load_mask(path, self.max_pixels)))
        return {
            "mask": mask,
            "label": record.label,
            "path": str(record.path),
            "item": record.item,
            "has_pixel_truth": record.has_pixel_truth,
        }

    def __getitem__(self, index: int) -> dict:
        return {"image": self.image(index), **self.annotations(index)}
