"""Positives ranked among negatives: every metric of the project is a sum over such ranks, exact or per bin.

With the scores of all negatives sorted once, the number of negatives above a positive is a binary search. AUROC, average
precision and best F1 only change at positive scores, and the area under a curve of found (weighted) positives is a partial
Mann-Whitney statistic. Where scores are only known by bin, the same sums with ties merged give a value, and the best and
the worst order within each bin give the range that the exact value lies in.
"""

from dataclasses import dataclass

import numpy as np

Range = tuple[float, float]


@dataclass(frozen=True)
class Ranks:
    """Positives grouped by score (or bin of scores), ascending, each group at least one positive.

    Attributes:
        counts: (n,) positives of each group.
        weights: (n,) sum of their weights.
        above, at_or_above: (n,) negatives that score higher, and at least as high.
        negative_count: all negatives.
    """

    counts: np.ndarray
    weights: np.ndarray
    above: np.ndarray
    at_or_above: np.ndarray
    negative_count: int


def exact_ranks(positives: np.ndarray, negatives: np.ndarray, weights: np.ndarray | None = None) -> Ranks:
    """Ranks of ascending positive scores (n,), n > 0, among ascending negative scores; weights (n,), 1 each by default."""
    first_of_tie = np.concatenate([[True], positives[1:] != positives[:-1]])
    start = np.flatnonzero(first_of_tie)
    counts = np.diff(start, append=len(positives))
    distinct = positives[start]
    return Ranks(
        counts=counts,
        weights=counts if weights is None else np.add.reduceat(weights, start),
        above=len(negatives) - np.searchsorted(negatives, distinct, side="right"),
        at_or_above=len(negatives) - np.searchsorted(negatives, distinct, side="left"),
        negative_count=len(negatives),
    )


def binned_ranks(counts: np.ndarray, weights: np.ndarray, negatives: np.ndarray) -> Ranks:
    """Ranks from histograms over ascending bins: positives and their weights, and negatives."""
    filled = np.flatnonzero(counts)
    at_or_above = np.cumsum(negatives[::-1])[::-1][filled]
    return Ranks(
        counts=counts[filled],
        weights=weights[filled],
        above=at_or_above - negatives[filled],
        at_or_above=at_or_above,
        negative_count=int(negatives.sum()),
    )


def auroc(ranks: Ranks) -> float:
    """Mann-Whitney: the share of negatives below a positive, ties counted half."""
    rank_sum = (ranks.counts * (ranks.above + ranks.at_or_above)).sum()
    return float(1 - rank_sum / ranks.counts.sum() / (2 * ranks.negative_count))


def auroc_range(ranks: Ranks) -> Range:
    """Between all positives of a bin behind and before its negatives."""
    return tuple(
        float(1 - (ranks.counts * before).sum() / ranks.counts.sum() / ranks.negative_count)
        for before in (ranks.at_or_above, ranks.above)
    )


def _found(ranks: Ranks) -> np.ndarray:
    """Positives that score at least as high as each group."""
    return np.cumsum(ranks.counts[::-1])[::-1]


def average_precision(ranks: Ranks) -> float:
    """Step-wise average precision, as scikit-learn."""
    found = _found(ranks)
    precision = found / (found + ranks.at_or_above)
    return float((precision * ranks.counts).sum() / found[0])


def average_precision_range(ranks: Ranks) -> Range:
    """Between a bin's negatives before its positives, which follow one by one, and its positives all at once before them.

    The k-th of c positives then has precision (p + k) / (p + k + n), p positives of higher bins and n negatives of this or
    higher bins being before it. Their sum is at least the integral over k from 0 to c, c - n log(1 + c / (p + n)).
    """
    found = _found(ranks)
    before = found - ranks.counts + ranks.at_or_above
    with np.errstate(divide="ignore", invalid="ignore"):
        loss = np.where(ranks.at_or_above > 0, ranks.at_or_above * np.log1p(ranks.counts / before), 0.0)
    best = ranks.counts * (found / (found + ranks.above))
    return float((ranks.counts - loss).sum() / found[0]), float(best.sum() / found[0])


def best_f1(ranks: Ranks) -> float:
    """The best F1 over all thresholds."""
    found = _found(ranks)
    return float((2 * found / (found + ranks.at_or_above + found[0])).max())


def best_f1_range(ranks: Ranks) -> Range:
    """Between thresholds at the ends of bins only, and positives before negatives within each bin."""
    found = _found(ranks)
    return best_f1(ranks), float((2 * found / (found + ranks.above + found[0])).max())


def partial_area(ranks: Ranks, limit: float) -> float:
    """Area under the curve of found weight (share of all) over the false-positive rate up to a limit, over the limit.

    Equals the trapezoid over all distinct scores with interpolation at the limit and merged ties. A positive is found from
    the rate `low` (ties last) to `high` (ties first) on, so it contributes the length of the curve to its right, linear in
    between.
    """
    low, high = ranks.above / ranks.negative_count, ranks.at_or_above / ranks.negative_count
    with np.errstate(divide="ignore", invalid="ignore"):
        partly = (limit - low) ** 2 / (2 * (high - low))
    contribution = np.where(high <= limit, limit - (low + high) / 2, np.where(low < limit, partly, 0.0))
    return float((ranks.weights * contribution).sum() / (ranks.weights.sum() * limit))


def partial_area_range(ranks: Ranks, limit: float) -> Range:
    """Between all positives of a bin behind and before its negatives."""
    total = ranks.weights.sum() * limit
    return tuple(
        float((ranks.weights * np.maximum(limit - before / ranks.negative_count, 0)).sum() / total)
        for before in (ranks.at_or_above, ranks.above)
    )
