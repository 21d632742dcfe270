"""From a trained detector to scores, kept whole for a few images or measured as they come."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, fields, replace
from itertools import islice

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from binarize.stages import mean_gate
from common.errors import CommandError, NumericError, UserError
from common.progress import ProgressBar
from datasets.catalog import Layout
from models.detector import Detector
from utils.devices import autocast
from utils.distributed import gather_to_main, is_main, rank, world_size
from utils.feature_cache import FeatureDataset
from utils.loading import loaded_batches
from utils.measurement import Measurement, collector, mean_of_gates, measurement_of, raise_first
from utils.metrics import Metrics, ProMode, compute_metrics
from utils.pixel_scores import PixelScores
from utils.protocol import (
    DEFAULT_METRIC_SIZE,
    EvaluationOptions,
    Scoring,
    binary_mask,
    image_score,
    regions_on_grid,
    smoothed_map,
)

logger = logging.getLogger(__name__)

SCALE_SIDE = DEFAULT_METRIC_SIZE  # pixels a side of each map that a scale is made from: enough for its quantiles
_NORMAL_SHARE = 0.995  # of the pixels of normal images that lie below the threshold of `--true_false val_quantile`


@dataclass(frozen=True)
class Evaluation:
    """Scores of some images: of a batch, or of a whole set that is small enough to keep its maps.

    Attributes:
        paths, labels, scores: per image.
        maps: (n, side, side) float32, smoothed. masks: (n, side, side) bool. has_pixel_truth: (n,) bool.
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

    def part(self, images: slice) -> "Evaluation":
        """Some of the images; the mean gate stays that of all."""
        parts = (values[images] for values in _columns(self))
        return Evaluation(*parts, mean_gate=self.mean_gate)

    def thinned(self, largest_side: int) -> "Evaluation":
        """The same scores with evenly spaced rows and columns of maps and masks, at most `largest_side` of each."""
        step = max(1, -(-self.maps.shape[-1] // largest_side))
        maps, masks = (np.ascontiguousarray(pixels[:, ::step, ::step]) for pixels in (self.maps, self.masks))
        return replace(self, maps=maps, masks=masks)


def _columns(evaluation: Evaluation) -> tuple:
    return tuple(getattr(evaluation, field.name) for field in fields(Evaluation) if field.name != "mean_gate")


@torch.no_grad()
def scored_batches(
    detector: Detector,
    data: Dataset,
    options: EvaluationOptions,
    batch_size: int,
    num_workers: int,
    precision: str,
    item: str,
) -> Iterator[Evaluation]:
    """Score all images of a data set, one batch at a time; close it if its end is not reached.

    Raises:
        NumericError: a map is not finite; names the image.
        UserError: the detector cannot score as the options say.
    """
    if not len(data):
        return
    detector.eval()
    map_of = _scoring_method(detector, options.scoring)
    with loaded_batches(data, num_workers, batch_size=batch_size) as batches:
        quiet = None if is_main() else True
        for batch in ProgressBar(
            batches, total=-(-len(data) // batch_size), desc=f"evaluating {item}", unit="batch", disable=quiet
        ):
            with autocast(detector.device, precision):
                anomaly_map = _map_in_memory(map_of, batch["image"].to(detector.device)).float()
            smoothed = smoothed_map(anomaly_map, options)
            score = image_score(smoothed, options.max_ratio)
            for path, finite in zip(batch["path"], smoothed.isfinite().flatten(1).all(dim=1).tolist(), strict=True):
                if not finite:
                    raise NumericError(
                        f"the anomaly map of {path!r} is not finite; the model is damaged or diverged, train it again"
                    )
            yield Evaluation(
                paths=batch["path"],
                labels=batch["label"].numpy(),
                scores=score.cpu().numpy(),
                maps=smoothed.cpu().numpy(),
                masks=binary_mask(batch["mask"], options).numpy(),
                has_pixel_truth=batch["has_pixel_truth"].numpy(),
                mean_gate=mean_gate(detector) if options.scoring == "reconstruction" else None,
            )


def evaluate(
    detector: Detector,
    data: Dataset,
    options: EvaluationOptions,
    batch_size: int,
    num_workers: int,
    precision: str,
    item: str,
    largest_side: int | None = None,
) -> Evaluation:
    """Score all images of a data set and keep all maps, 5 bytes per pixel; raises as `scored_batches`.

    `largest_side`: keep of each only so many rows and columns at most, evenly spaced.
    """
    with closing(scored_batches(detector, data, options, batch_size, num_workers, precision, item)) as batches:
        parts = [batch.thinned(largest_side) if largest_side else batch for batch in batches]
    if not parts:
        nothing = np.empty((0, options.metric_size, options.metric_size), np.float32)
        return Evaluation([], np.empty(0, int), np.empty(0, np.float32), nothing, nothing.astype(bool), np.empty(0, bool))
    _, *arrays = zip(*map(_columns, parts), strict=True)
    paths = [path for part in parts for path in part.paths]
    gates = [part.mean_gate for part in parts for _ in part.paths]
    return Evaluation(paths, *map(np.concatenate, arrays), mean_gate=mean_of_gates(gates))


def _scoring_method(detector: Detector, scoring: Scoring) -> Callable[[Tensor], Tensor]:
    if scoring == "reconstruction":
        return detector.anomaly_map
    if not hasattr(detector, "prototype_map"):
        raise UserError(f"--scoring prototype: {type(detector).__name__} has no prototypes; give --scoring reconstruction")
    return detector.prototype_map


def _map_in_memory(map_of: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
    """Anomaly maps, in two halves when the device's memory does not suffice: each image's map is independent."""
    try:
        return map_of(inputs)
    except torch.OutOfMemoryError:
        if len(inputs) == 1:
            raise
    logger.warning("out of device memory for %d images; halving the batch", len(inputs))
    torch.cuda.empty_cache()  # only after the handler, which holds on to the failed attempt's tensors
    return torch.cat([_map_in_memory(map_of, half) for half in inputs.chunk(2)])


def calibrate_scale(evaluation: Evaluation, quantile: float = 0.999) -> dict[str, float | list[float]]:
    """What normal looks like, from maps and scores of normal images: the fixed scale of heat maps and thresholds.

    `map_median`, `map_limit` (the quantile) and `map_threshold` (the 0.995 quantile, of `--true_false val_quantile`) of all
    pixels; `scores` of all images, ascending.
    """
    return {
        "map_median": float(np.median(evaluation.maps)),
        "map_limit": float(np.quantile(evaluation.maps, quantile)),
        "map_threshold": float(np.quantile(evaluation.maps, _NORMAL_SHARE)),
        "scores": sorted(map(float, evaluation.scores)),
    }


def measure(
    detector: Detector,
    data: Dataset,
    options: EvaluationOptions,
    batch_size: int,
    num_workers: int,
    precision: str,
    item: str,
    metrics_memory: float | None,
    layout: Layout,
) -> Measurement | None:
    """Score all images of a category and measure them without keeping maps.

    Several processes share the batches, composed as for one process, and all must call this; the main one returns the same
    measurement as one process alone would, the others None.

    Args:
        data: `ImageDataset` or `FeatureDataset`.
        metrics_memory: GB for pixel metrics, beyond which they come from bins; None for half of what is available.

    Raises:
        NumericError: a map is not finite, on whatever process.
        UserError: the detector cannot score as the options say, or Dinomaly's AUPRO needs more than `metrics_memory`.
    """
    own, images = _own_images(len(data), batch_size), data.images if isinstance(data, FeatureDataset) else data
    map_pixels = options.map_side(images.crop_size) ** 2
    pixels = collector(data.records, len(own), map_pixels, metrics_memory, options.pro_mode, item)
    columns, error, started = None, None, time.perf_counter()
    try:
        with closing(scored_batches(detector, Subset(data, own), options, batch_size, num_workers, precision, item)) as batches:
            columns = _collect(batches, pixels, images, own, options, layout)
    except CommandError as problem:
        error = problem
    seconds = time.perf_counter() - started
    raise_first(error)
    pixels.gather()
    gathered = [list(gather_to_main(values)) for values in columns]
    if not is_main():
        return None
    rules = options.pro_mode, item, layout, seconds, options.true_false
    return measurement_of(data.records, *map(np.concatenate, gathered), pixels, *rules)


def _own_images(count: int, batch_size: int) -> range:
    """Images of this process: a contiguous share of the batches that one process would make."""
    batches = -(-count // batch_size)
    first, end = (batches * process // world_size() for process in (rank(), rank() + 1))
    return range(first * batch_size, min(end * batch_size, count))


def _collect(
    batches: Iterator[Evaluation], pixels: PixelScores, images: Dataset, own: range, options: EvaluationOptions, layout: Layout
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Put all maps into `pixels`; returns scores, gates (NaN without) and whether a known mask marks nothing, per image."""
    scores, gates, empty = [np.empty(0, np.float32)], [], [np.empty(0, bool)]
    records = iter(images.records[own.start : own.stop])
    for batch in batches:
        regions = None
        if layout.defect_regions:
            found = (layout.defect_regions(record, images.max_pixels) for record in islice(records, len(batch.paths)))
            sizes = images.input_size, images.crop_size
            regions = [regions_on_grid(each, *sizes, options, images.interpolation) for each in found]
        pixels.add(batch.maps, batch.masks, batch.has_pixel_truth, regions)
        scores.append(batch.scores)
        gates += [np.nan if batch.mean_gate is None else batch.mean_gate] * len(batch.paths)
        empty.append((batch.labels == 1) & batch.has_pixel_truth & ~batch.masks.any(axis=(1, 2)))
    return np.concatenate(scores), np.array(gates, np.float64), np.concatenate(empty)
