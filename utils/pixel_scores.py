"""Pixel scores of a whole test set, collected batch by batch: every value, or counts in bins where those do not fit.

Several processes collect their own images; `gather` brings all scores to the main one, where order of arrival changes no
bit of the result.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import cv2
import numpy as np

from datasets.records import DefectRegion
from utils.distributed import gather_to_main
from utils.ranks import Ranks, binned_ranks, exact_ranks

BIN_COUNT = 1 << 20  # sign, exponent and 11 bits of the mantissa of a float32: scores within 1/2048 share a bin
_SIGN = np.uint32(1 << 31)
_FIXED_POINT = 2.0**32
_BYTES_PER_PIXEL = 4
_BYTES_PER_DEFECT_PIXEL = 100  # score and weight, and what ranking takes for a moment
_DEFECT_SHARE = 0.1  # of a defective image's pixels, rather more than any public data set has on average


def exact_bytes(pixels: int, defective_pixels: int) -> float:
    """Memory of `ExactPixelScores`, about: of all images' pixels, and those of defective images."""
    return _BYTES_PER_PIXEL * pixels + _BYTES_PER_DEFECT_PIXEL * _DEFECT_SHARE * defective_pixels


def region_weights(mask: np.ndarray) -> np.ndarray:
    """1 / area of its 8-connected region for every defect pixel of a boolean mask (H, W), in flat order."""
    _, labels, statistics, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    return 1.0 / statistics[:, cv2.CC_STAT_AREA][labels[mask]]


def saturated_pixels(anomaly_map: np.ndarray, region: DefectRegion) -> tuple[np.ndarray, np.ndarray]:
    """Scores and weights, sum 1, of the pixels that find a region: with those above any threshold it is found to the
    share min(found pixels / saturation, 1).

    Only the highest ceil(saturation) pixels can matter; the last one fills up what is left. `region` is given on the map's
    pixels (H, W), its saturation at most its area.
    """
    count = int(np.ceil(region.saturation))
    weights = np.full(count, 1 / region.saturation)
    weights[0] = 1 - (count - 1) / region.saturation
    return np.sort(anomaly_map[region.mask])[-count:], weights


class PixelScores(ABC):
    """What all pixels of a test set scored, defect-free ones and defect pixels with their weights."""

    def add(
        self, maps: np.ndarray, masks: np.ndarray, known: np.ndarray, regions: Sequence[list[DefectRegion]] | None = None
    ) -> None:
        """Add the images of one batch whose pixels' truth is `known` (n,).

        Args:
            maps, masks: (n, H, W) scores and boolean truth.
            regions: each image's regions that saturate, on the map's pixels, inside its mask.
        """
        for index in np.flatnonzero(known):
            anomaly_map, mask = maps[index], masks[index]
            self._add_negatives(anomaly_map[~mask])
            if mask.any():
                self._add_positives(anomaly_map[mask], region_weights(mask))
            for region in regions[index] if regions else ():
                self._add_saturated(*saturated_pixels(anomaly_map, region))

    @abstractmethod
    def gather(self) -> None:
        """Bring what all processes added to the main one, in order of rank; every process must call it."""

    @abstractmethod
    def ranks(self) -> Ranks | None:
        """Defect pixels, each weighing 1 / area of its region; None if no pixel or every pixel is defective."""

    @abstractmethod
    def saturated_ranks(self) -> Ranks | None:
        """Pixels of saturating regions; None if there are none, or no defect-free pixel."""

    @abstractmethod
    def _add_negatives(self, scores: np.ndarray) -> None: ...

    @abstractmethod
    def _add_positives(self, scores: np.ndarray, weights: np.ndarray) -> None: ...

    @abstractmethod
    def _add_saturated(self, scores: np.ndarray, weights: np.ndarray) -> None: ...


class _WeightedScores:
    """Scores and weights as they come, then in ascending order of the scores."""

    def __init__(self):
        self._parts: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])

    def add(self, scores: np.ndarray, weights: np.ndarray) -> None:
        for parts, values in zip(self._parts, (scores, weights), strict=True):
            parts.append(values)

    def gather(self, dtype: np.dtype) -> None:
        for parts, kind in zip(self._parts, (dtype, np.float64), strict=True):
            own = np.concatenate([np.empty(0, kind), *parts])
            parts[:] = gather_to_main(own)

    def in_order(self) -> tuple[np.ndarray, np.ndarray] | None:
        if not self._parts[0]:
            return None
        scores, weights = map(np.concatenate, self._parts)
        order = np.argsort(scores, kind="stable")
        return (scores[order], weights[order]) if len(scores) else None


class ExactPixelScores(PixelScores):
    """Every score: 4 bytes per defect-free pixel in one array, which is sorted in place."""

    def __init__(self, capacity: int, dtype: np.dtype = np.float32):
        """`capacity` defect-free pixels at most (on the main process: of all processes); memory is taken as they come."""
        self._buffer = np.empty(capacity, dtype)
        self._count, self._sorted = 0, False
        self._positives, self._saturated = _WeightedScores(), _WeightedScores()

    def _add_negatives(self, scores: np.ndarray) -> None:
        self._buffer[self._count : self._count + len(scores)] = scores
        self._count += len(scores)
        self._sorted = False

    def _add_positives(self, scores: np.ndarray, weights: np.ndarray) -> None:
        self._positives.add(scores, weights)

    def _add_saturated(self, scores: np.ndarray, weights: np.ndarray) -> None:
        self._saturated.add(scores, weights)

    def gather(self) -> None:
        for source, scores in enumerate(gather_to_main(self._buffer[: self._count])):
            if source:
                self._add_negatives(scores)
        self._positives.gather(self._buffer.dtype)
        self._saturated.gather(self._buffer.dtype)

    def _negatives(self) -> np.ndarray:
        negatives = self._buffer[: self._count]
        if not self._sorted:
            negatives.sort()
            self._sorted = True
        return negatives

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        """Scores of defect pixels, their weights, and scores of defect-free pixels, ascending; None as in `ranks`."""
        positives = self._positives.in_order()
        return (*positives, self._negatives()) if positives and self._count else None

    def ranks(self) -> Ranks | None:
        return self._ranks(self._positives)

    def saturated_ranks(self) -> Ranks | None:
        return self._ranks(self._saturated)

    def _ranks(self, scored: _WeightedScores) -> Ranks | None:
        positives = scored.in_order()
        return exact_ranks(positives[0], self._negatives(), positives[1]) if positives and self._count else None


def score_bins(scores: np.ndarray) -> np.ndarray:
    """Bin of each float32 score: a higher score is never in a lower bin, whatever the range of the scores."""
    bits = (scores + np.float32(0)).view(np.uint32)  # the sum turns -0 into the 0 that it equals
    return (np.where(bits & _SIGN, ~bits, bits | _SIGN) // (2**32 // BIN_COUNT)).astype(np.int64)


class _Histogram:
    """Number and weight of positives by bin; weights, at most 1 each, as integers, so that no order of adding matters."""

    def __init__(self):
        self._counts = np.zeros(BIN_COUNT, np.int64)
        self._weights = np.zeros((2, BIN_COUNT), np.int64)  # units of 2^-32 and 2^-64

    def add(self, scores: np.ndarray, weights: np.ndarray) -> None:
        bins = score_bins(scores)
        coarse = np.floor(weights * _FIXED_POINT)
        fine = np.rint((weights * _FIXED_POINT - coarse) * _FIXED_POINT)
        np.add.at(self._counts, bins, 1)
        for sums, part in zip(self._weights, (coarse, fine), strict=True):
            np.add.at(sums, bins, part.astype(np.int64))

    def gather(self) -> None:
        _sum_to_main(self._counts)
        _sum_to_main(self._weights)

    def ranks(self, negatives: np.ndarray) -> Ranks | None:
        if not self._counts.any() or not negatives.any():
            return None
        coarse, fine = self._weights
        return binned_ranks(self._counts, (coarse + fine / _FIXED_POINT) / _FIXED_POINT, negatives)


class HistogramPixelScores(PixelScores):
    """Counts of float32 scores by bin, 56 MB whatever the number of images."""

    def __init__(self):
        self._negatives = np.zeros(BIN_COUNT, np.int64)
        self._positives, self._saturated = _Histogram(), _Histogram()

    def _add_negatives(self, scores: np.ndarray) -> None:
        np.add.at(self._negatives, score_bins(scores), 1)

    def _add_positives(self, scores: np.ndarray, weights: np.ndarray) -> None:
        self._positives.add(scores, weights)

    def _add_saturated(self, scores: np.ndarray, weights: np.ndarray) -> None:
        self._saturated.add(scores, weights)

    def gather(self) -> None:
        _sum_to_main(self._negatives)
        self._positives.gather()
        self._saturated.gather()

    def ranks(self) -> Ranks | None:
        return self._positives.ranks(self._negatives)

    def saturated_ranks(self) -> Ranks | None:
        return self._saturated.ranks(self._negatives)


def _sum_to_main(counts: np.ndarray) -> None:
    """Add the counts of all other processes to those of the main one, in place."""
    for source, part in enumerate(gather_to_main(counts)):
        if source:
            counts += part
