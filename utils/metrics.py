"""Image and pixel metrics from one sort; exact, without thresholds or bins.

With the scores of all negatives sorted once, the number of negatives above any positive score is a binary search. AUROC,
average precision and best F1 only change at positive scores, and AUPRO is a weighted partial Mann-Whitney statistic, so
these ranks give all four.
"""

from dataclasses import astuple, dataclass
from typing import Literal

import cv2
import numpy as np

PRO_LIMIT = 0.3
_LINEAR_THRESHOLDS = 200
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


METRIC_NAMES = ("I-AUROC", "I-AP", "I-F1", "P-AUROC", "P-AP", "P-F1", "AUPRO")


def named(metrics: Metrics) -> dict[str, float | None]:
    """Metrics by their column name."""
    return dict(zip(METRIC_NAMES, astuple(metrics), strict=True))


@dataclass(frozen=True)
class _Ranks:
    """Positive scores in ascending order and, for each, the number of negatives above (strictly, and with ties)."""

    above: np.ndarray
    at_or_above: np.ndarray
    positives: np.ndarray
    negative_count: int


def _rank(sorted_positives: np.ndarray, sorted_negatives: np.ndarray) -> _Ranks:
    count = len(sorted_negatives)
    return _Ranks(
        above=count - np.searchsorted(sorted_negatives, sorted_positives, side="right"),
        at_or_above=count - np.searchsorted(sorted_negatives, sorted_positives, side="left"),
        positives=sorted_positives,
        negative_count=count,
    )


def _auroc(ranks: _Ranks) -> float:
    """Mann-Whitney: the share of negatives below a positive, ties counted half."""
    return float(1 - (ranks.above + ranks.at_or_above).mean() / (2 * ranks.negative_count))


def _average_precision_and_f1(ranks: _Ranks) -> tuple[float, float]:
    """Step-wise average precision (as scikit-learn) and the best F1 over all thresholds."""
    positives = ranks.positives
    first_of_tie = np.concatenate([[True], positives[1:] != positives[:-1]])
    start = np.flatnonzero(first_of_tie)
    true_positives = len(positives) - start  # at threshold = that score
    tie_size = np.diff(np.append(start, len(positives)))
    predicted = true_positives + ranks.at_or_above[start]
    precision = true_positives / predicted
    average_precision = float((precision * tie_size).sum() / len(positives))
    f1 = float((2 * true_positives / (predicted + len(positives))).max())
    return average_precision, f1


def _exact_aupro(ranks: _Ranks, weights: np.ndarray) -> float:
    """Area under the per-region overlap curve up to FPR 0.3, divided by 0.3.

    Equals the official trapezoid with interpolation at the limit and merged ties. A positive pixel is found from
    FPR F1 (ties last) to F2 (ties first) on, so it contributes the length of the curve to its right, linear in between.
    `weights` is 1 / region area per positive pixel; their sum is the number of regions.
    """
    low, high = ranks.above / ranks.negative_count, ranks.at_or_above / ranks.negative_count
    with np.errstate(divide="ignore", invalid="ignore"):
        partly = (PRO_LIMIT - low) ** 2 / (2 * (high - low))
    contribution = np.where(high <= PRO_LIMIT, PRO_LIMIT - (low + high) / 2, np.where(low < PRO_LIMIT, partly, 0.0))
    return float((weights * contribution).sum() / (weights.sum() * PRO_LIMIT))


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
    ranks = _rank(np.sort(scores[labels]), np.sort(scores[~labels]))
    return _auroc(ranks), *_average_precision_and_f1(ranks)


def region_weights(masks: np.ndarray) -> np.ndarray:
    """1 / area of its 8-connected region for every defect pixel of boolean masks (n, H, W), in their flat order."""
    weights = []
    for mask in masks:
        if mask.any():
            _, labels, statistics, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
            areas = statistics[:, cv2.CC_STAT_AREA]
            weights.append(1.0 / areas[labels[mask]])
    return np.concatenate(weights) if weights else np.empty(0)


def pixel_metrics(maps: np.ndarray, masks: np.ndarray, pro_mode: ProMode = "exact") -> tuple[float | None, ...]:
    """P-AUROC, P-AP, P-F1 and AUPRO of maps (n, H, W) against boolean masks (n, H, W).

    Four Nones if no pixel or every pixel is defective.
    """
    masks = np.asarray(masks, dtype=bool)
    if masks.all() or not masks.any():
        return None, None, None, None
    positives, negatives = maps[masks], np.sort(maps[~masks])
    order = np.argsort(positives, kind="stable")
    positives, weights = positives[order], region_weights(masks)[order]
    ranks = _rank(positives, negatives)
    exact = pro_mode == "exact"
    aupro = _exact_aupro(ranks, weights) if exact else _dinomaly_aupro(positives, weights, negatives)
    return _auroc(ranks), *_average_precision_and_f1(ranks), aupro


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
    every = bool(has_pixel_truth.all())
    known_maps, known_masks = (maps, masks) if every else (maps[has_pixel_truth], masks[has_pixel_truth])
    return Metrics(*ranking_metrics(scores, labels), *pixel_metrics(known_maps, known_masks, pro_mode))


def mean_metrics(rows: list[dict[str, float | None]]) -> dict[str, float | None]:
    """Unweighted mean of every column over the rows that have it."""
    means = {}
    for name in METRIC_NAMES:
        values = [row[name] for row in rows if row[name] is not None]
        means[name] = sum(values) / len(values) if values else None
    return means
