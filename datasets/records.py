"""The one record type of all data sets, and the torch data set that reads it."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from common.errors import UserError
from datasets.images import DEFAULT_MAX_PIXELS, image_size, load_image, load_mask
from datasets.transforms import image_transform, mask_transform


@dataclass(frozen=True)
class Record:
    """One image of a data set.

    Attributes:
        path: image file.
        label: 0 good, 1 defective.
        item: category.
        masks: mask files of a defective image (several are united); empty for a good image.
        has_pixel_truth: whether every pixel's label is known; false for a defective image without a mask.
    """

    path: Path
    label: int
    item: str
    masks: tuple[Path, ...] = ()

    @property
    def has_pixel_truth(self) -> bool:
        return self.label == 0 or bool(self.masks)


def check_mask_sizes(records: list[Record], max_pixels: int = DEFAULT_MAX_PIXELS) -> None:
    """Raise UserError for the first mask whose size is not its image's."""
    for record in records:
        for mask in record.masks:
            expected, found = image_size(record.path, max_pixels), image_size(mask, max_pixels)
            if expected != found:
                raise UserError(
                    f"mask size differs: {str(mask)!r} is {found[0]}x{found[1]}, its image {str(record.path)!r} is "
                    f"{expected[0]}x{expected[1]}; masks must be drawn on the image's own pixels"
                )


class ImageDataset(Dataset):
    """Records as dict(image, mask, label, path, item, has_pixel_truth).

    image (3, crop, crop) float32 normalised; mask (1, crop, crop) float32 in 0..1, zeros where there is none.
    """

    def __init__(
        self, records: list[Record], input_size: int, crop_size: int, max_pixels: int = DEFAULT_MAX_PIXELS
    ):
        self.records = records
        self.input_size, self.crop_size, self.max_pixels = input_size, crop_size, max_pixels
        self._transform_image = image_transform(input_size, crop_size)
        self._transform_mask = mask_transform(input_size, crop_size)

    def __len__(self) -> int:
        return len(self.records)

    def image(self, index: int) -> Tensor:
        """Transformed image (3, crop, crop)."""
        return self._transform_image(load_image(self.records[index].path, self.max_pixels))

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
