"""The papers' evaluation protocol: from a raw anomaly map to 256 x 256 scores, from a mask to the truth beside them."""

from dataclasses import dataclass, fields
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from datasets.records import DefectRegion
from datasets.transforms import mask_transform
from utils.metrics import ProMode

METRIC_SIZE = 256
Scoring = Literal["reconstruction", "prototype"]


@dataclass(frozen=True)
class EvaluationOptions:
    """The protocol: every number that changes a metric (INP-Former's values are the defaults)."""

    mask_threshold: float = 0.5
    smoothing_kernel: int = 5
    smoothing_sigma: float = 4.0
    max_ratio: float = 0.01
    pro_mode: ProMode = "exact"
    scoring: Scoring = "reconstruction"

    @classmethod
    def from_config(cls, config: dict) -> "EvaluationOptions":
        """The protocol of a stored configuration; one from before there was a choice of scoring has its default."""
        config = {"scoring": cls.scoring, **config}
        return cls(**{field.name: config[field.name] for field in fields(cls)})

    def describe(self) -> str:
        """The protocol in one line."""
        smoothing = (
            f"Gaussian {self.smoothing_kernel}x{self.smoothing_kernel}, sigma {self.smoothing_sigma:g}"
            if self.smoothing_kernel
            else "none"
        )
        top = f"mean of the top {self.max_ratio:.1%} of pixels" if self.max_ratio else "maximum pixel"
        pro = "exact up to FPR 0.3" if self.pro_mode == "exact" else "Dinomaly's 200 thresholds (biased low)"
        source = "distance to the nearest prototype, " if self.scoring == "prototype" else ""
        return (
            f"{source}maps at {METRIC_SIZE}x{METRIC_SIZE}; smoothing: {smoothing}; image score: {top}; "
            f"mask: > {self.mask_threshold:g}; AUPRO: {pro}; P-AP: exact, step-wise"
        )


def gaussian_kernel(size: int, sigma: float) -> Tensor:
    """(1, 1, size, size), sum 1."""
    offsets = torch.arange(size, dtype=torch.float32) - (size - 1) / 2
    line = torch.exp(-(offsets**2) / (2 * sigma**2))
    kernel = torch.outer(line, line)
    return (kernel / kernel.sum())[None, None]


def smoothed_map(anomaly_map: Tensor, options: EvaluationOptions) -> Tensor:
    """(B, H, W) -> (B, 256, 256): bilinear, then Gaussian with zero padding (which darkens the border, as published)."""
    resized = F.interpolate(anomaly_map.unsqueeze(1), size=(METRIC_SIZE, METRIC_SIZE), mode="bilinear", align_corners=False)
    if options.smoothing_kernel:
        kernel = gaussian_kernel(options.smoothing_kernel, options.smoothing_sigma).to(resized)
        resized = F.conv2d(resized, kernel, padding=options.smoothing_kernel // 2)
    return resized.squeeze(1)


def image_score(maps: Tensor, max_ratio: float) -> Tensor:
    """(B, H, W) -> (B,): mean of the largest int(H W max_ratio) pixels, the maximum for 0."""
    pixels = maps.flatten(1)
    return pixels.topk(max(1, int(pixels.shape[1] * max_ratio)), dim=1).values.mean(dim=1)


def binary_mask(mask: Tensor, threshold: float) -> Tensor:
    """(B, 1, H, W) in 0..1 -> (B, 256, 256) bool: nearest neighbour, then > threshold."""
    return F.interpolate(mask, size=(METRIC_SIZE, METRIC_SIZE), mode="nearest").squeeze(1) > threshold


def regions_on_grid(regions: list[DefectRegion], input_size: int, crop_size: int, threshold: float) -> list[DefectRegion]:
    """Regions as the maps see them: (256, 256) masks by the way of all masks, saturation in pixels of that size.

    A saturation is at most the region's area, of which the crop may have left a part; a region outside the crop is left out.
    """
    transform, found = mask_transform(input_size, crop_size), []
    for region in regions:
        height, width = region.mask.shape
        grey = transform(Image.fromarray(region.mask.astype(np.uint8) * 255))
        mask = binary_mask(grey.unsqueeze(0), threshold)[0].numpy()
        if mask.any():
            density = input_size**2 / (height * width) * (METRIC_SIZE / crop_size) ** 2
            found.append(DefectRegion(mask, min(region.saturation * density, float(mask.sum()))))
    return found
