"""Image and mask transforms of INP-Former, Dinomaly and VarAD: resize, centre crop, normalise; no augmentation."""

from typing import Literal

from torchvision import transforms
from torchvision.transforms import InterpolationMode

from common.normalisation import IMAGENET_MEAN, IMAGENET_STD

Interpolation = Literal["bilinear", "bicubic"]


def image_transform(input_size: int, crop_size: int, interpolation: Interpolation = "bilinear") -> transforms.Compose:
    """PIL RGB -> (3, crop, crop): exact resize whatever the aspect, centre crop, ImageNet mean and std."""
    return transforms.Compose(
        [
            transforms.Resize((input_size, input_size), InterpolationMode(interpolation)),
            transforms.ToTensor(),
            transforms.CenterCrop(crop_size),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )


def mask_transform(input_size: int, crop_size: int, interpolation: Interpolation = "bilinear") -> transforms.Compose:
    """PIL grey mask -> (1, crop, crop) in 0..1: bilinear like the image, hence grey at the edges, or nearest beside bicubic."""
    mode = InterpolationMode.NEAREST if interpolation == "bicubic" else InterpolationMode.BILINEAR
    return transforms.Compose(
        [transforms.Resize((input_size, input_size), mode), transforms.CenterCrop(crop_size), transforms.ToTensor()]
    )


def interpolation_entry(interpolation: Interpolation) -> dict[str, str]:
    """What a cache's key and a model's file say of the resize: nothing of a bilinear one, as before there was a choice."""
    return {} if interpolation == "bilinear" else {"interpolation": interpolation}
