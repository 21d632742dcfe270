"""Images of anything but the product, on which EfficientAD's student is to say nothing."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torchvision import transforms

from common.errors import UserError
from datasets.images import is_image_file, load_image
from datasets.transforms import IMAGENET_MEAN, IMAGENET_STD

_GREY_SHARE = 0.3


def images_below(folder: Path) -> Iterator[Path]:
    """Image files of a folder and of the folders in it, in no order."""
    return (path for path in folder.rglob("*") if is_image_file(path))


class PenaltyImages:
    """Random images of a folder and of the folders in it, drawn from torch's global generator.

    Each is resized to twice the side, grey with probability 0.3, and cut to its middle (EfficientAD's published training).

    Raises:
        UserError: the folder holds no image.
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
        picks = torch.randint(len(self.paths), (count,)).tolist()
        return torch.stack([self.transform(load_image(self.paths[pick])) for pick in picks])
