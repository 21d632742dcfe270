"""The papers' evaluation protocol: from a raw anomaly map to scores of its pixels, from a mask to the truth beside them."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import ndimage
from torch import Tensor

from common.errors import UserError
from datasets.records import DefectRegion
from datasets.transforms import Interpolation, mask_transform
from utils.metrics import NO_TRUE_FALSE, NORMAL_QUANTILE, ProMode, fixed_threshold

DEFAULT_METRIC_SIZE = 256
LEAST_METRIC_SIZE = 16
Scoring = Literal["reconstruction", "prototype"]
SmoothingBorder = Literal["zeros", "reflect"]


@dataclass(frozen=True)
class EvaluationOptions:
    """The protocol: every number that changes a metric (INP-Former's values are the defaults).

    Attributes:
        metric_size: side of the maps and masks that are measured, in pixels; 0 for the crop's, which they have by themselves.
        smoothing_border: what the Gaussian finds beyond a map's border.
        true_false: threshold of RAAD's TRUE and FALSE of pixels: `f1max` that of the best F1, `fixed:VALUE` a map's value,
            `val_quantile` what 99.5 % of the pixels of the normal images lie below that a model was calibrated on; `off`: they
            are not measured.
    """

    mask_threshold: float = 0.5
    smoothing_kernel: int = 5
    smoothing_sigma: float = 4.0
    max_ratio: float = 0.01
    pro_mode: ProMode = "exact"
    scoring: Scoring = "reconstruction"
    metric_size: int = DEFAULT_METRIC_SIZE
    smoothing_border: SmoothingBorder = "zeros"
    true_false: str = NO_TRUE_FALSE

    @classmethod
    def from_config(cls, config: dict) -> "EvaluationOptions":
        """The protocol of a stored configuration; where one is older than a choice, it has that one's default."""
        later = ("scoring", "metric_size", "smoothing_border", "true_false")
        config = {**{name: getattr(cls, name) for name in later}, **config}
        return cls(**{field.name: config[field.name] for field in fields(cls)})

    def map_side(self, crop_size: int) -> int:
        """Side of the maps that are measured, in pixels."""
        return self.metric_size or crop_size

    def with_threshold(self, calibration: Mapping[str, object] | None) -> "EvaluationOptions":
        """The same with a number in the place of `val_quantile`, from what a checkpoint says of normal images.

        Raises:
            UserError: it does not say it, or there is none for these images (None).
        """
        if self.true_false != NORMAL_QUANTILE:
            return self
        if calibration is None:
            raise UserError(
                f"--true_false {NORMAL_QUANTILE}: this model knows no normal images that are scored as these are; give f1max "
                "or fixed:VALUE"
            )
        if "map_threshold" not in calibration:
            raise UserError(
                f"--true_false {NORMAL_QUANTILE}: the checkpoint is from before this was stored; train it again, or give f1max "
                "or fixed:VALUE"
            )
        return replace(self, true_false=f"fixed:{calibration['map_threshold']}")

    def describe(self) -> str:
        """The protocol in one line."""
        size = f"{self.metric_size}x{self.metric_size}" if self.metric_size else "the crop's size"
        border = "reflected at the border" if self.smoothing_border == "reflect" else "zeros beyond the border"
        smoothing = (
            f"Gaussian {self.smoothing_kernel}x{self.smoothing_kernel}, sigma {self.smoothing_sigma:g}, {border}"
            if self.smoothing_kernel
            else "none"
        )
        top = f"mean of the top {self.max_ratio:.1%} of pixels" if self.max_ratio else "maximum pixel"
        pro = "exact up to FPR 0.3" if self.pro_mode == "exact" else "Dinomaly's 200 thresholds (biased low)"
        source = "distance to the nearest prototype, " if self.scoring == "prototype" else ""
        return (
            f"{source}maps at {size}; smoothing: {smoothing}; image score: {top}; "
            f"mask: > {self.mask_threshold:g}; AUPRO: {pro}; P-AP: exact, step-wise{self._describe_true_false()}"
        )

    def _describe_true_false(self) -> str:
        if self.true_false == NO_TRUE_FALSE:
            return ""
        threshold = fixed_threshold(self.true_false)
        if threshold is not None:
            rule = f"{threshold:g}"
        elif self.true_false == NORMAL_QUANTILE:
            rule = "the 0.995 quantile of the normal images that the model was calibrated on"
        else:
            rule = "the threshold of its best P-F1, chosen on the test images"
        return f"; P-TRUE (recall) and P-FALSE (1 - precision): of all pixels of a category, at scores >= {rule}"


def gaussian_kernel(size: int, sigma: float) -> Tensor:
    """(1, 1, size, size), sum 1."""
    offsets = torch.arange(size, dtype=torch.float32) - (size - 1) / 2
    line = torch.exp(-(offsets**2) / (2 * sigma**2))
    kernel = torch.outer(line, line)
    return (kernel / kernel.sum())[None, None]


def smoothed_map(anomaly_map: Tensor, options: EvaluationOptions) -> Tensor:
    """(B, H, W) -> (B, side, side): bilinear to the metric's size if it has one, then a Gaussian of the kernel's width.

    INP-Former and Dinomaly pad with zeros, which darkens the border. VarAD's reflected border (d c b a | a b c d) is scipy's,
    computed on the CPU.
    """
    resized = anomaly_map.unsqueeze(1)
    if options.metric_size:
        size = (options.metric_size, options.metric_size)
        resized = F.interpolate(resized, size=size, mode="bilinear", align_corners=False)
    if options.smoothing_kernel and options.smoothing_border == "reflect":
        radius, sigma = (options.smoothing_kernel - 1) // 2, options.smoothing_sigma
        smoothed = ndimage.gaussian_filter(resized.cpu().numpy(), sigma, radius=radius, mode="reflect", axes=(2, 3))
        resized = torch.from_numpy(smoothed).to(resized.device)
    elif options.smoothing_kernel:
        kernel = gaussian_kernel(options.smoothing_kernel, options.smoothing_sigma).to(resized)
        resized = F.conv2d(resized, kernel, padding=options.smoothing_kernel // 2)
    return resized.squeeze(1)


def image_score(maps: Tensor, max_ratio: float) -> Tensor:
    """(B, H, W) -> (B,): mean of the largest int(H W max_ratio) pixels, the maximum for 0."""
    pixels = maps.flatten(1)
    return pixels.topk(max(1, int(pixels.shape[1] * max_ratio)), dim=1).values.mean(dim=1)


def binary_mask(mask: Tensor, options: EvaluationOptions) -> Tensor:
    """(B, 1, H, W) in 0..1 -> (B, side, side) bool: nearest neighbour to the metric's size if it has one, then > threshold."""
    if options.metric_size:
        mask = F.interpolate(mask, size=(options.metric_size, options.metric_size), mode="nearest")
    return mask.squeeze(1) > options.mask_threshold


def regions_on_grid(
    regions: list[DefectRegion],
    input_size: int,
    crop_size: int,
    options: EvaluationOptions,
    interpolation: Interpolation = "bilinear",
) -> list[DefectRegion]:
    """Regions as the maps see them: (side, side) masks by the way of all masks, saturation in pixels of that size.

    A saturation is at most the region's area, of which the crop may have left a part; a region outside the crop is left out.
    """
    transform, found = mask_transform(input_size, crop_size, interpolation), []
    for region in regions:
        height, width = region.mask.shape
        grey = transform(Image.fromarray(region.mask.astype(np.uint8) * 255))
        mask = binary_mask(grey.unsqueeze(0), options)[0].numpy()
        if mask.any():
            density = input_size**2 / (height * width) * (options.map_side(crop_size) / crop_size) ** 2
            found.append(DefectRegion(mask, min(region.saturation * density, float(mask.sum()))))
    return found
