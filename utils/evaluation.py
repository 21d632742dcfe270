"""From a trained detector to scores: the papers' evaluation protocol, step by step."""

import logging
from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from binarize.stages import mean_gate
from common.errors import NumericError
from models.detector import Detector
from utils.devices import autocast
from utils.loading import loaded_batches
from utils.metrics import Metrics, ProMode, compute_metrics

logger = logging.getLogger(__name__)

METRIC_SIZE = 256


@dataclass(frozen=True)
class EvaluationOptions:
    """The protocol: every number that changes a metric (INP-Former's values are the defaults)."""

    mask_threshold: float = 0.5
    smoothing_kernel: int = 5
    smoothing_sigma: float = 4.0
    max_ratio: float = 0.01
    pro_mode: ProMode = "exact"

    @classmethod
    def from_config(cls, config: dict) -> "EvaluationOptions":
        """The protocol of a stored configuration."""
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
        return (
            f"maps at {METRIC_SIZE}x{METRIC_SIZE}; smoothing: {smoothing}; image score: {top}; "
            f"mask: > {self.mask_threshold:g}; AUPRO: {pro}; P-AP: exact, step-wise"
        )


@dataclass(frozen=True)
class Evaluation:
    """Scores of one category's images.

    Attributes:
        paths, labels, scores: per image.
        maps: (n, 256, 256) float32, smoothed. masks: (n, 256, 256) bool. has_pixel_truth: (n,) bool.
        mean_gate: share of the attention maps that was binary (mean of all gates of SAB), None without such gates.
    """

    paths: list[str]
    labels: np.ndarray
    scores: np.ndarray
    maps: np.ndarray
    masks: np.ndarray
    has_pixel_truth: np.ndarray
    mean_gate: float | None = None

    def metrics(self, pro_mode: ProMode) -> Metrics:
        """The seven metrics."""
        return compute_metrics(self.scores, self.labels, self.maps, self.masks, self.has_pixel_truth, pro_mode)


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


@torch.no_grad()
def evaluate(
    detector: Detector,
    data: Dataset,
    options: EvaluationOptions,
    batch_size: int,
    num_workers: int,
    precision: str,
    item: str,
) -> Evaluation:
    """Score all images of a data set; raises NumericError naming the image whose map is not finite."""
    detector.eval()
    if len(data) == 0:
        nothing = np.empty((0, METRIC_SIZE, METRIC_SIZE), np.float32)
        return Evaluation([], np.empty(0, int), np.empty(0), nothing, nothing.astype(bool), np.empty(0, bool))
    paths, labels, scores, maps, masks, truth, gates = [], [], [], [], [], [], []
    with loaded_batches(data, num_workers, batch_size=batch_size) as batches:
        for batch in tqdm(batches, total=-(-len(data) // batch_size), desc=f"evaluating {item}", unit="batch", disable=None):
            with autocast(detector.device, precision):
                anomaly_map = _map_in_memory(detector, batch["image"].to(detector.device)).float()
            smoothed = smoothed_map(anomaly_map, options)
            score = image_score(smoothed, options.max_ratio)
            for path, finite in zip(batch["path"], smoothed.isfinite().flatten(1).all(dim=1).tolist(), strict=True):
                if not finite:
                    raise NumericError(
                        f"the anomaly map of {path!r} is not finite; the model is damaged or diverged, train it again"
                    )
            paths += batch["path"]
            labels.append(batch["label"].numpy())
            scores.append(score.cpu().numpy())
            maps.append(smoothed.cpu().numpy())
            masks.append(binary_mask(batch["mask"], options.mask_threshold).numpy())
            truth.append(batch["has_pixel_truth"].numpy())
            gates += [mean_gate(detector)] * len(batch["path"])
    arrays = (np.concatenate(part) for part in (labels, scores, maps, masks, truth))
    return Evaluation(paths, *arrays, mean_gate=None if None in gates else sum(gates) / len(gates))


def _map_in_memory(detector: Detector, inputs: Tensor) -> Tensor:
    """Anomaly maps, in two halves when the device's memory does not suffice: each image's map is independent."""
    try:
        return detector.anomaly_map(inputs)
    except torch.OutOfMemoryError:
        if len(inputs) == 1:
            raise
    logger.warning("out of device memory for %d images; halving the batch", len(inputs))
    torch.cuda.empty_cache()  # only after the handler, which holds on to the failed attempt's tensors
    return torch.cat([_map_in_memory(detector, half) for half in inputs.chunk(2)])


def calibrate_scale(evaluation: Evaluation) -> dict[str, float | list[float]]:
    """What normal looks like, from maps and scores of training images: the fixed scale of heat maps and thresholds.

    `map_median` and `map_limit` (99.9 %) of all pixels; `scores` of all images, ascending.
    """
    return {
        "map_median": float(np.median(evaluation.maps)),
        "map_limit": float(np.quantile(evaluation.maps, 0.999)),
        "scores": sorted(map(float, evaluation.scores)),
    }
