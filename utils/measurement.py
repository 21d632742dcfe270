"""What is measured of a category, from image scores and collected pixel scores."""

import logging
from dataclasses import dataclass

import numpy as np
import torch.distributed as dist

from common.errors import CommandError, UserError
from datasets.catalog import Layout
from datasets.records import Record
from utils.cache_plan import available_memory
from utils.distributed import is_main, on_main, peers_expected, world_size
from utils.metrics import (
    METRIC_NAMES,
    NO_TRUE_FALSE,
    TRUE_FALSE_NAMES,
    PixelMetrics,
    ProMode,
    collected_pixel_metrics,
    kind_aurocs,
    ranking_metrics,
)
from utils.pixel_scores import BIN_COUNT, ExactPixelScores, HistogramPixelScores, PixelScores, exact_bytes

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Measurement:
    """One category's scores and metrics, without its maps.

    Attributes:
        paths, labels, scores: per image.
        empty_masks: defective images with known truth whose mask marks nothing within the crop.
        metrics: by column name: the seven, then those that only some data sets have, then TRUE and FALSE if they are wanted.
        pixel_error: the exact pixel metrics lie at most this far from the given ones; None where these are exact.
        mean_gate: share of the attention maps that was binary, None without gates.
        seconds: what the main process took to read and score its images, without the metrics.
    """

    paths: list[str]
    labels: np.ndarray
    scores: np.ndarray
    empty_masks: int
    metrics: dict[str, float | None]
    pixel_error: float | None
    mean_gate: float | None
    seconds: float


def collector(
    records: list[Record], own_count: int, map_pixels: int, metrics_memory: float | None, pro_mode: ProMode, item: str
) -> PixelScores:
    """An empty collection for the scores of `map_pixels` pixels of `own_count` of the records; on the main process of all.

    Every score is kept if that takes at most `metrics_memory` GB (None: half of the available memory), else bins.

    Raises:
        UserError: Dinomaly's AUPRO, which needs every score, would take more.
    """
    if on_main(lambda: _fits_exactly(records, map_pixels, metrics_memory, pro_mode, item)):
        return ExactPixelScores(map_pixels * (len(records) if is_main() else own_count))
    return HistogramPixelScores()


def _fits_exactly(records: list[Record], map_pixels: int, metrics_memory: float | None, pro_mode: ProMode, item: str) -> bool:
    known = [record.label for record in records if record.has_pixel_truth]
    need = exact_bytes(map_pixels * len(known), map_pixels * sum(known)) / 1e9
    if world_size() > 1:
        need *= 2  # on the processes that scored, and once more on the main one
    allowed = available_memory() / 2 / 1e9 if metrics_memory is None else metrics_memory
    if need <= allowed:
        return True
    if pro_mode == "dinomaly":
        raise UserError(
            f"{item}: --pro_mode dinomaly needs all pixel scores, about {need:.2g} GB, more than the {allowed:.2g} GB allowed; "
            "give a larger --metrics_memory or --pro_mode exact"
        )
    logger.warning(
        "%s: exact pixel metrics need about %.2g GB, --metrics_memory allows %.2g GB; they come from %d bins instead",
        item,
        need,
        allowed,
        BIN_COUNT,
    )
    return False


def raise_first(error: CommandError | None) -> None:
    """Raise on every process the error of the first process that has one; every process must call it."""
    errors = [error]
    if world_size() > 1:
        errors = [None] * world_size()
        with peers_expected():
            dist.all_gather_object(errors, error)
    for found in errors:
        if found is not None:
            raise found


def mean_of_gates(gates: list[float | None]) -> float | None:
    """Mean over images; None if the detector has no gates."""
    return None if None in gates or not gates else sum(gates) / len(gates)


def measurement_of(
    records: list[Record],
    scores: np.ndarray,
    gates: np.ndarray,
    empty: np.ndarray,
    pixels: PixelScores,
    pro_mode: ProMode,
    item: str,
    layout: Layout,
    seconds: float,
    true_false: str = NO_TRUE_FALSE,
) -> Measurement:
    """All metrics of a category.

    Args:
        scores, gates, empty: (n,) per record: image score, mean gate (NaN without gates), whether its mask marks nothing.
        pixels: gathered scores of all records with known truth.
        seconds: as `Measurement.seconds`.
        true_false: as `EvaluationOptions.true_false`.
    """
    labels, kinds = np.array([record.label for record in records], int), [record.kind for record in records]
    metrics = collected_pixel_metrics(pixels, pro_mode, true_false)
    if metrics.error is not None:
        logger.warning("%s: pixel metrics from %d bins; the exact values lie within ±%.1e", item, BIN_COUNT, metrics.error)
        if true_false != NO_TRUE_FALSE:
            logger.warning("%s: %s and %s stay empty, bins do not know their threshold", item, *TRUE_FALSE_NAMES)
    return Measurement(
        paths=[str(record.path) for record in records],
        labels=labels,
        scores=scores,
        empty_masks=int(empty.sum()),
        metrics=_columns(scores, labels, kinds, metrics, layout) | _true_false_columns(metrics, true_false),
        pixel_error=metrics.error,
        mean_gate=mean_of_gates([None if np.isnan(gate) else gate for gate in gates.tolist()]),
        seconds=seconds,
    )


def _columns(
    scores: np.ndarray, labels: np.ndarray, kinds: list[str], pixel: PixelMetrics, layout: Layout
) -> dict[str, float | None]:
    values = (*ranking_metrics(scores, labels), pixel.auroc, pixel.ap, pixel.f1, pixel.aupro)
    columns = dict(zip(METRIC_NAMES, values, strict=True))
    if layout.split_kinds:
        columns |= kind_aurocs(scores, kinds, layout.split_kinds)
    if layout.defect_regions:
        columns["AU-sPRO"] = pixel.saturated_overlap
    return columns


def _true_false_columns(pixel: PixelMetrics, rule: str) -> dict[str, float | None]:
    return {} if rule == NO_TRUE_FALSE else dict(zip(TRUE_FALSE_NAMES, (pixel.recall, pixel.false_share), strict=True))
