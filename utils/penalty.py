"""Images of anything but the product, on which EfficientAD's student is to say nothing."""

import hashlib
import logging
from collections.abc import Iterator
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms

from common.errors import UserError
from datasets.images import is_image_file, load_image
from datasets.transforms import IMAGENET_MEAN, IMAGENET_STD

logger = logging.getLogger(__name__)

_GREY_SHARE = 0.3
_MOST_UNREADABLE = 10  # one after the other; then something is wrong with all of them


def images_below(folder: Path) -> Iterator[Path]:
    """Image files of a folder and of the folders in it, in no order."""
    return (path for path in folder.rglob("*") if is_image_file(path))


def names_sha256(folder: Path) -> str:
    """Hash of the names of all its images: with other images a training would draw others from then on."""
    names = sorted(str(path.relative_to(folder)) for path in images_below(folder))
    return hashlib.sha256("\n".join(names).encode("utf-8", "surrogateescape")).hexdigest()


class PenaltyImages:
    """Random images of a folder and of the folders in it, drawn from torch's global generator.

    Each is resized to twice the side, grey with probability 0.3, and cut to its middle (EfficientAD's published training). In
    the place of one that cannot be read comes the next draw.

    Raises:
        UserError: the folder holds no image or, when they are drawn, hardly one that can be read.
    """

    def __init__(self, folder: Path, side: int):
        self.paths = sorted(images_below(folder))
        if not self.paths:
            raise UserError(f"--penalty_images {str(folder)!r} holds no image; give a folder with some, or leave it out")
        self.transform = transforms.Compose(
            [
                transforms.Resize((2 * side, 2 * side)),
                transforms.RandomGrayscale(_GREY_SHARE),
                transforms.CenterCrop(side),
                transforms.ToTensor(),
                transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
            ]
        )

    def __call__(self, count: int) -> Tensor:
        return torch.stack([self.transform(self._draw()) for _ in range(count)])

    def _draw(self) -> Image.Image:
        for _ in range(_MOST_UNREADABLE):
            try:
                return load_image(self.paths[int(torch.randint(len(self.paths), ()))])
            except UserError as error:
                logger.warning("left out of --penalty_images: %s", error)
                problem = error
        raise problem
