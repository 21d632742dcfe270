"""Image and pixel metrics from one sort; exact, without thresholds, or from fine bins with the error that this can cause."""

from dataclasses import astuple, dataclass
from typing import Literal

import numpy as np

from utils.pixel_scores import ExactPixelScores, HistogramPixelScores, PixelScores
from utils.ranks import (
    Ranks,
    auroc,
    auroc_range,
    average_precision,
    average_precision_range,
    best_f1,
    best_f1_range,
    exact_ranks,
    partial_area,
    partial_area_range,
)

PRO_LIMIT = 0.3
SPRO_LIMIT = 0.05
_LINEAR_THRESHOLDS = 200
NO_TRUE_FALSE, BEST_F1, NORMAL_QUANTILE = "off", "f1max", "val_quantile"
TRUE_FALSE_NAMES = ("P-TRUE", "P-FALSE")
ProMode = Literal["exact", "dinomaly"]


@dataclass(frozen=True)
class Metrics:
    """Fractions in 0..1; None where the metric does not exist (no masks, or one class only)."""

    image_auroc: float | None = None
    image_ap: float | None = None
    image_f1: float | None = None
    pixel_auroc: float | None = None
    pixel_ap: float | None = None
    pixel_f1: float | None = None
    aupro: float | None = None


@dataclass(frozen=True)
class PixelMetrics:
    """Fractions in 0..1; None where the metric does not exist.

    Attributes:
        saturated_overlap: AU-sPRO, the area under the curve of saturated per-region overlap up to FPR 0.05, over 0.05.
        recall, false_share: RAAD's TRUE and FALSE, see `_true_and_false`.
        error: the exact values lie at most this far from the given ones; None where these are exact.
    """

    auroc: float | None = None
    ap: float | None = None
    f1: float | None = None
    aupro: float | None = None
    saturated_overlap: float | None = None
    recall: float | None = None
    false_share: float | None = None
    error: float | None = None


METRIC_NAMES = ("I-AUROC", "I-AP", "I-F1", "P-AUROC", "P-AP", "P-F1", "AUPRO")


def named(metrics: Metrics) -> dict[str, float | None]:
    """Metrics by their column name."""
    return dict(zip(METRIC_NAMES, astuple(metrics), strict=True))


def _dinomaly_aupro(positives: np.ndarray, weights: np.ndarray, negatives: np.ndarray) -> float | None:
    """AUPRO as Dinomaly computes it: 200 equally spaced thresholds, FPR below 0.3 rescaled to 0..1, no interpolation.

    Biased low, more so with a few extreme scores; only for comparison with published columns. None where it has no
    value (a perfect map).
    """
    low, high = min(positives[0], negatives[0]), max(positives[-1], negatives[-1])
    thresholds = np.linspace(low, high, _LINEAR_THRESHOLDS, endpoint=False, dtype=np.float64)
    false_positive_rate = (len(negatives) - np.searchsorted(negatives, thresholds, side="right")) / len(negatives)
    covered = np.concatenate([np.cumsum(weights[::-1])[::-1], [0.0]])
    overlap = covered[np.searchsorted(positives, thresholds, side="right")] / weights.sum()
    kept = false_positive_rate < PRO_LIMIT
    if not kept.any() or false_positive_rate[kept].max() == 0:
        return None
    rate = false_positive_rate[kept] / false_positive_rate[kept].max()
    return float(np.trapezoid(overlap[kept][::-1], rate[::-1]))  # both fall with the threshold


def ranking_metrics(scores: np.ndarray, labels: np.ndarray) -> tuple[float, float, float] | tuple[None, None, None]:
    """AUROC, average precision and best F1 of scores (n,) for boolean labels (n,); Nones if a class is missing."""
    labels = np.asarray(labels, dtype=bool)
    if labels.all() or not labels.any():
        return None, None, None
    ranks = exact_ranks(np.sort(scores[labels]), np.sort(scores[~labels]))
    return auroc(ranks), average_precision(ranks), best_f1(ranks)


def kind_aurocs(scores: np.ndarray, kinds: list[str], split_kinds: tuple[str, ...]) -> dict[str, float | None]:
    """I-AUROC of the good images (kind "") against the defective ones of each kind alone, and the mean of these.

    Columns are `I-AUROC-logical` for `logical_anomalies` and so on; None where images of that kind, or good ones, are
    missing, and for a mean that lacks one.
    """
    names = np.array(kinds, dtype=str)
    columns = {}
    for kind in split_kinds:
        chosen = (names == "") | (names == kind)
        columns[f"I-AUROC-{kind.removesuffix('_anomalies')}"] = ranking_metrics(scores[chosen], names[chosen] == kind)[0]
    values = list(columns.values())
    return {**columns, "I-AUROC-mean": None if None in values else sum(values) / len(values)}


def fixed_threshold(rule: str) -> float | None:
    """VALUE of the rule `fixed:VALUE`, None for another."""
    kind, _, value = rule.partition(":")
    return float(value) if kind == "fixed" else None


def _true_and_false(scores: ExactPixelScores, ranks: Ranks, rule: str) -> tuple[float | None, float | None]:
    """RAAD's TRUE |M & G| / |G| and FALSE 1 - |M & G| / |M| of all pixels together (figure 6): recall and 1 - precision.

    M are the pixels with at least the threshold of `rule` (the paper names none), `f1max` for that of the best F1, of equal
    ones the highest; G are the defect pixels. FALSE is None where no pixel reaches the threshold, both are with `off`.
    """
    if rule == NO_TRUE_FALSE:
        return None, None
    defective, threshold = int(ranks.counts.sum()), fixed_threshold(rule)
    if rule == BEST_F1:
        found, wrong = np.cumsum(ranks.counts[::-1]), ranks.at_or_above[::-1]  # with each threshold, the highest first
        best = np.argmax(2 * found / (found + wrong + defective))
        hits, false = int(found[best]), int(wrong[best])
    else:
        positives, _, negatives = scores.arrays()
        limit = positives.dtype.type(threshold)
        hits, false = (len(values) - int(np.searchsorted(values, limit)) for values in (positives, negatives))
    return hits / defective, false / (hits + false) if hits + false else None


def collected_pixel_metrics(scores: PixelScores, pro_mode: ProMode = "exact", true_false: str = NO_TRUE_FALSE) -> PixelMetrics:
    """All pixel metrics of collected scores (after `gather` on the main process).

    All None if no pixel or every pixel is defective. `pro_mode` "dinomaly" needs `ExactPixelScores`, and so do TRUE and FALSE:
    no error could be stated of a threshold that bins only know about.

    Args:
        true_false: rule of their threshold, `f1max` or `fixed:VALUE`; `off`: they are not measured. `val_quantile` is none,
            since it needs a model's normal images: `EvaluationOptions.with_threshold` makes a fixed one of it.
    """
    ranks = scores.ranks()
    if ranks is None:
        return PixelMetrics()
    saturated = scores.saturated_ranks()
    values = [auroc(ranks), average_precision(ranks), best_f1(ranks)]
    values.append(partial_area(ranks, PRO_LIMIT) if pro_mode == "exact" else _dinomaly_aupro(*scores.arrays()))
    values.append(partial_area(saturated, SPRO_LIMIT) if saturated else None)
    if not isinstance(scores, HistogramPixelScores):
        return PixelMetrics(*values, *_true_and_false(scores, ranks, true_false))
    ranges = [auroc_range(ranks), average_precision_range(ranks), best_f1_range(ranks), partial_area_range(ranks, PRO_LIMIT)]
    if saturated:
        ranges.append(partial_area_range(saturated, SPRO_LIMIT))
    error = max(abs(end - value) for value, ends in zip(values, ranges, strict=False) for end in ends)
    return PixelMetrics(*values, error=error)


def pixel_metrics(maps: np.ndarray, masks: np.ndarray, pro_mode: ProMode = "exact") -> tuple[float | None, ...]:
    """P-AUROC, P-AP, P-F1 and AUPRO of maps (n, H, W) against boolean masks (n, H, W).

    Four Nones if no pixel or every pixel is defective.
    """
    masks = np.asarray(masks, dtype=bool)
    return _pixel_metrics(maps, masks, np.ones(len(maps), bool), pro_mode)


def _pixel_metrics(maps: np.ndarray, masks: np.ndarray, known: np.ndarray, pro_mode: ProMode) -> tuple[float | None, ...]:
    scores = ExactPixelScores(maps.size - np.count_nonzero(masks), maps.dtype)
    scores.add(maps, masks, known)
    metrics = collected_pixel_metrics(scores, pro_mode)
    return metrics.auroc, metrics.ap, metrics.f1, metrics.aupro


def compute_metrics(
    scores: np.ndarray,
    labels: np.ndarray,
    maps: np.ndarray,
    masks: np.ndarray,
    has_pixel_truth: np.ndarray,
    pro_mode: ProMode = "exact",
) -> Metrics:
    """All seven metrics of one category.

    Args:
        scores: (n,) image scores. labels: (n,) 1 for defective.
        maps, masks: (n, H, W) pixel scores and boolean truth.
        has_pixel_truth: (n,) false where a defective image has no mask; such images count for image metrics only.
    """
    return Metrics(*ranking_metrics(scores, labels), *_pixel_metrics(maps, masks, has_pixel_truth, pro_mode))


def column_names(rows: list[dict[str, float | None]]) -> tuple[str, ...]:
    """The seven metrics, then what further ones any of the rows has, in order."""
    return tuple(dict.fromkeys([*METRIC_NAMES, *(name for row in rows for name in row)]))


def mean_metrics(rows: list[dict[str, float | None]]) -> dict[str, float | None]:
    """Unweighted mean of every column over the rows that have it."""
    means = {}
    for name in column_names(rows):
        values = [row[name] for row in rows if row.get(name) is not None]
        means[name] = sum(values) / len(values) if values else None
    return means
