"""Collected pixel scores: bins against exact values and their stated error, saturated overlap, memory, order of arrival."""

import itertools
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from datasets.records import DefectRegion
from tests.test_metrics import KINDS, score_maps, sklearn_metrics, truth
from utils.metrics import PixelMetrics, collected_pixel_metrics, kind_aurocs, pixel_metrics
from utils.pixel_scores import BIN_COUNT, ExactPixelScores, HistogramPixelScores, PixelScores, region_weights, score_bins
from utils.ranks import (
    Ranks,
    auroc,
    auroc_range,
    average_precision,
    average_precision_range,
    best_f1,
    best_f1_range,
    binned_ranks,
    exact_ranks,
    partial_area,
    partial_area_range,
)

LIMIT = 0.05
RANGES: dict[str, tuple[Callable, Callable]] = {
    "AUROC": (auroc, auroc_range),
    "AP": (average_precision, average_precision_range),
    "F1": (best_f1, best_f1_range),
    "AUPRO": (lambda ranks: partial_area(ranks, 0.3), lambda ranks: partial_area_range(ranks, 0.3)),
}
SPREADS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "as they are": lambda maps: maps,
    "both signs": lambda maps: maps - maps.mean(),
    "tiny": lambda maps: maps * 1e-30,
    "one pixel far off": lambda maps: np.where(np.arange(maps.size).reshape(maps.shape) == 77, 1e30, maps),
    "all but one value": lambda maps: 5 + 1e-4 * maps,
    "zeros of both signs": lambda maps: np.where(maps > 2, maps, np.where(maps > 1, 0.0, -0.0)),
}


def collected(form: PixelScores, maps: np.ndarray, masks: np.ndarray, regions: list | None = None) -> PixelMetrics:
    form.add(maps, masks, np.ones(len(maps), bool), regions)
    return collected_pixel_metrics(form)


def assert_within_its_error(binned: PixelMetrics, exact: tuple) -> None:
    for value, expected in zip((binned.auroc, binned.ap, binned.f1, binned.aupro), exact, strict=True):
        assert abs(value - expected) <= binned.error + 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_bins_keep_their_word_on_maps_of_every_kind(kind):
    masks = truth()
    maps = score_maps(kind, masks).astype(np.float32)
    binned = collected(HistogramPixelScores(), maps, masks)
    assert_within_its_error(binned, pixel_metrics(maps, masks))
    assert_within_its_error(binned, (*sklearn_metrics(maps.ravel(), masks.ravel()), binned.aupro))


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("seed", range(3))
def test_bins_keep_their_word_whatever_the_range_of_the_scores(spread, seed):
    masks = truth()
    maps = SPREADS[spread](score_maps("plain", masks, seed)).astype(np.float32)
    binned = collected(HistogramPixelScores(), maps, masks)
    assert_within_its_error(binned, pixel_metrics(maps, masks))


def test_bins_are_precise_on_ordinary_maps():
    masks = np.kron(truth(), np.ones((1, 4, 4), bool))
    maps = score_maps("plain", masks).astype(np.float32)
    binned = collected(HistogramPixelScores(), maps, masks)
    assert 0 < binned.error < 1e-3
    exact = pixel_metrics(maps, masks)
    assert (binned.auroc, binned.ap, binned.f1, binned.aupro) == pytest.approx(exact, abs=1e-4)


@pytest.mark.parametrize("metric", RANGES)
@pytest.mark.parametrize("levels", [1, 2, 5, 20])
def test_ranges_of_coarse_bins_hold_every_order_within_the_bins(metric, levels):
    """Random scores of random sets, of which the bins know only the part before the point."""
    exact_of, range_of = RANGES[metric]
    for seed in range(40):
        generator = np.random.default_rng(seed)
        negatives, positives = generator.uniform(0, levels, 30), generator.uniform(0, levels, 12)
        if seed % 2:
            negatives, positives = negatives.round(1) % levels, positives.round(1) % levels
        weights = generator.uniform(0.1, 1, len(positives))
        order = np.argsort(positives)
        value = exact_of(exact_ranks(positives[order], np.sort(negatives), weights[order]))
        low, high = range_of(coarse_ranks(positives, weights, negatives, levels))
        assert low - 1e-12 <= value <= high + 1e-12
        merged = exact_of(coarse_ranks(positives, weights, negatives, levels))
        assert low - 1e-12 <= merged <= high + 1e-12


def coarse_ranks(positives: np.ndarray, weights: np.ndarray, negatives: np.ndarray, levels: int) -> Ranks:
    bins, other = positives.astype(int), negatives.astype(int)
    counts = np.bincount(bins, minlength=levels), np.bincount(bins, weights, levels), np.bincount(other, minlength=levels)
    return binned_ranks(*counts)


@pytest.mark.parametrize("metric", RANGES)
def test_the_upper_end_is_what_the_best_order_has(metric):
    exact_of, range_of = RANGES[metric]
    positives, negatives = np.array([0.9, 0.9, 2.9, 4.9]), np.array([0.1, 1.1, 1.2, 2.1, 2.2, 3.1, 4.1, 4.2])
    weights = np.array([1.0, 0.5, 0.5, 0.25])
    best = exact_of(exact_ranks(positives, negatives, weights))
    assert range_of(coarse_ranks(positives, weights, negatives, 5))[1] == pytest.approx(best, abs=1e-12)


def test_bins_are_ordered_like_the_scores_and_finer_than_a_two_thousandth():
    scores = np.array([-np.inf, -3e38, -1.0, -0.9995, -1e-40, 0.0, 1e-40, 0.9995, 1.0, 1.0005, 3e38, np.inf], np.float32)
    bins = score_bins(scores)
    assert (np.diff(bins) > 0).all()
    assert bins.min() >= 0
    assert bins.max() < BIN_COUNT
    assert score_bins(np.array([-0.0], np.float32)) == score_bins(np.array([0.0], np.float32))
    scores = np.sort(np.random.default_rng(0).normal(0, 10, 10000).astype(np.float32))
    assert (np.diff(score_bins(scores)) >= 0).all()


def square_regions() -> tuple[np.ndarray, list[list[DefectRegion]]]:
    """Six images; two regions that overlap, whole and partial and fractional saturation, one region of one pixel."""

    def region(saturation: float, rows: slice, columns: slice) -> DefectRegion:
        mask = np.zeros((14, 11), bool)
        mask[rows, columns] = True
        return DefectRegion(mask, saturation)

    regions = [
        [region(20.0, slice(2, 6), slice(3, 8)), region(4.6, slice(5, 9), slice(6, 10))],
        [],
        [region(1.0, slice(0, 1), slice(0, 1)), region(7.3, slice(6, 14), slice(0, 2))],
        [region(0.4, slice(3, 5), slice(3, 5))],
        [],
        [region(3.0, slice(9, 12), slice(2, 9))],
    ]
    masks = np.array(
        [np.any([part.mask for part in image], axis=0) if image else np.zeros((14, 11), bool) for image in regions]
    )
    return masks, regions


def slow_saturated_overlap(maps: np.ndarray, regions: list[list[DefectRegion]]) -> float:
    """AU-sPRO from its definition: every distinct score a threshold, every region compared anew."""
    outside = np.array(
        [~np.any([part.mask for part in image] or [np.zeros(maps.shape[1:], bool)], axis=0) for image in regions]
    )
    points = [(0.0, 0.0)]
    for threshold in np.unique(maps)[::-1]:
        predicted = maps >= threshold
        shares = [
            min((predicted[index] & part.mask).sum() / part.saturation, 1.0)
            for index, image in enumerate(regions)
            for part in image
        ]
        points.append((float(predicted[outside].mean()), float(np.mean(shares))))
    area = 0.0
    for (left, low), (right, high) in itertools.pairwise(points):
        if right > LIMIT:
            high = low + (high - low) * (LIMIT - left) / (right - left)
            right = LIMIT
        area += (right - left) * (low + high) / 2
        if right == LIMIT:
            break
    return area / LIMIT


@pytest.mark.parametrize("decimals", [None, 1, 0])
@pytest.mark.parametrize("seed", range(4))
def test_saturated_overlap_equals_a_threshold_sweep(seed, decimals):
    masks, regions = square_regions()
    maps = score_maps("plain", masks, seed) + masks * 3
    maps = (maps if decimals is None else maps.round(decimals)).astype(np.float32)
    expected = slow_saturated_overlap(maps, regions)
    assert 0.1 < expected < 0.95
    exact = collected(ExactPixelScores(maps.size), maps, masks, regions)
    assert exact.saturated_overlap == pytest.approx(expected, abs=1e-12)
    binned = collected(HistogramPixelScores(), maps, masks, regions)
    assert abs(binned.saturated_overlap - expected) <= binned.error + 1e-12


def test_saturated_overlap_of_saturation_at_the_area_is_the_overlap():
    """Without saturation and without touching regions only the limit distinguishes AU-sPRO from AUPRO."""
    masks, _ = square_regions()
    masks[0, 5:9, 6:10] = False
    regions = [[] for _ in masks]
    for index, rows in ((0, slice(None)), (2, slice(0, 3)), (2, slice(3, None)), (3, slice(None)), (5, slice(None))):
        part = np.zeros_like(masks[index])
        part[rows] = masks[index][rows]
        regions[index].append(DefectRegion(part, float(part.sum())))
    maps = score_maps("plain", masks).astype(np.float32) + 2 * masks.astype(np.float32)
    form = ExactPixelScores(maps.size)
    form.add(maps, masks, np.ones(len(maps), bool), regions)
    assert partial_area(form.saturated_ranks(), 0.3) == pytest.approx(pixel_metrics(maps, masks)[3], abs=1e-12)


def test_one_pixel_of_a_saturated_region_is_enough():
    masks = np.zeros((1, 20, 20), bool)
    masks[0, 5:15, 5:15] = True
    maps = np.where(masks, -1.0, 0.0).astype(np.float32)
    maps[0, 9, 9] = 1.0
    found = collected(ExactPixelScores(maps.size), maps, masks, [[DefectRegion(masks[0], 1.0)]])
    half = collected(ExactPixelScores(maps.size), maps, masks, [[DefectRegion(masks[0], 2.0)]])
    assert (found.saturated_overlap, half.saturated_overlap) == pytest.approx((1.0, 0.5), abs=1e-12)


@pytest.mark.parametrize("form", [lambda: ExactPixelScores(10**5), HistogramPixelScores])
def test_images_of_unknown_truth_are_left_out(form):
    masks, regions = square_regions()
    maps = score_maps("plain", masks).astype(np.float32)
    known = np.array([True, True, False, True, False, True])
    some, rest = form(), form()
    some.add(maps, masks, known, regions)
    rest.add(maps[known], masks[known], known[known], [image for image, kept in zip(regions, known, strict=True) if kept])
    assert collected_pixel_metrics(some) == collected_pixel_metrics(rest)


@pytest.mark.parametrize("form", [lambda: ExactPixelScores(10**5), HistogramPixelScores])
def test_without_defect_or_without_background_there_is_no_metric(form):
    maps = np.random.default_rng(0).random((2, 14, 11), np.float32)
    whole = DefectRegion(np.ones((14, 11), bool), 5.0)
    assert collected(form(), maps, np.zeros(maps.shape, bool)) == PixelMetrics()
    assert collected(form(), maps, np.ones(maps.shape, bool), [[whole], [whole]]) == PixelMetrics()


def test_batches_and_their_order_change_no_bit_of_the_bins():
    masks, regions = square_regions()
    masks, regions = np.tile(masks, (4, 1, 1)), regions * 4
    maps = score_maps("tied", masks).astype(np.float32)
    whole, pieces = HistogramPixelScores(), HistogramPixelScores()
    whole.add(maps, masks, np.ones(24, bool), regions)
    for index in np.random.default_rng(0).permutation(24):
        pieces.add(maps[index, None], masks[index, None], np.ones(1, bool), [regions[index]])
    assert collected_pixel_metrics(whole) == collected_pixel_metrics(pieces)


def test_weights_in_bins_are_those_of_the_regions():
    masks = truth()
    maps = np.arange(masks.size, dtype=np.float32).reshape(masks.shape)
    form = HistogramPixelScores()
    form.add(maps, masks, np.ones(len(masks), bool))
    expected = np.bincount(score_bins(maps[masks]), np.concatenate([region_weights(mask) for mask in masks if mask.any()]))
    np.testing.assert_allclose(form.ranks().weights, expected[expected > 0], rtol=1e-14)


def test_exact_scores_take_four_bytes_per_pixel():
    count, side = 100, 256
    generator = np.random.default_rng(0)
    mask = np.zeros((1, side, side), bool)
    mask[0, :8, :8] = True
    known = np.ones(1, bool)
    tracemalloc.start()
    form = ExactPixelScores(count * side**2)
    for _ in range(count):
        form.add(generator.random((1, side, side), np.float32), mask, known)
    collected_pixel_metrics(form)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4.3 * count * side**2


def test_aurocs_by_kind_equal_scikit_learn():
    generator = np.random.default_rng(0)
    kinds = generator.choice(["", "logical_anomalies", "structural_anomalies"], 80)
    scores = generator.normal(0, 1, 80).round(1) + (kinds == "logical_anomalies") * 0.5 + (kinds == "structural_anomalies")
    columns = kind_aurocs(scores, kinds.tolist(), ("logical_anomalies", "structural_anomalies"))
    expected = {}
    for kind in ("logical", "structural"):
        chosen = (kinds == "") | (kinds == f"{kind}_anomalies")
        expected[f"I-AUROC-{kind}"] = roc_auc_score(kinds[chosen] != "", scores[chosen])
    expected["I-AUROC-mean"] = (expected["I-AUROC-logical"] + expected["I-AUROC-structural"]) / 2
    assert columns == pytest.approx(expected, abs=1e-12)
    assert list(columns) == list(expected)


def test_a_kind_without_images_has_no_auroc_and_no_mean():
    columns = kind_aurocs(np.array([0.0, 1.0]), ["", "logical_anomalies"], ("logical_anomalies", "structural_anomalies"))
    assert columns == {"I-AUROC-logical": 1.0, "I-AUROC-structural": None, "I-AUROC-mean": None}
