"""Metrics against scikit-learn, the official AUPRO curve, hand-computed cases and a plain loop of Dinomaly's AUPRO."""

import itertools

import numpy as np
import pytest
import torch
from pyaupro import PerRegionOverlap
from scipy import ndimage, stats
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from utils.metrics import METRIC_NAMES, Metrics, compute_metrics, mean_metrics, named, pixel_metrics, ranking_metrics

LIMIT = 0.3
EIGHT_CONNECTED = np.ones((3, 3), dtype=int)


def truth(height: int = 40, width: int = 40) -> np.ndarray:
    """Eight masks, three of them empty, with regions of 1 to 99 pixels, touching borders and diagonals."""
    masks = np.zeros((8, height, width), dtype=bool)
    masks[0, 5:14, 6:17] = True
    masks[1, 0:2, 0:3] = masks[1, 20, 20] = True
    masks[2, 10:13, 10:13] = masks[2, 13:15, 13:20] = True  # one region: they touch at a corner
    masks[3, -4:, -5:] = masks[3, 3:30, 8] = True
    masks[4, 17:19, 2:6] = True
    return masks


def score_maps(kind: str, masks: np.ndarray, seed: int = 0) -> np.ndarray:
    """Maps of one kind; several regions are found well, some badly, as with a real detector."""
    generator = np.random.default_rng(seed)
    maps = generator.gamma(2.0, 1.0, masks.shape) + masks * generator.uniform(0, 4, (len(masks), 1, 1))
    changed = {
        "plain": lambda: maps,
        "float32": lambda: maps.astype(np.float32),
        "useless": lambda: generator.random(masks.shape),
        "tied": lambda: np.round(maps * 2) / 2,
        "two values": lambda: (maps > 3).astype(float),
        "outliers": lambda: np.where(np.arange(maps.size).reshape(maps.shape) < 4, 50.0, maps),
        "constant": lambda: np.full(masks.shape, 0.7),
        "perfect": lambda: masks.astype(float),
        "inverted": lambda: 1 - masks.astype(float),
        "negative": lambda: -maps,
    }
    return changed[kind]()


KINDS = ["plain", "float32", "useless", "tied", "two values", "outliers", "constant", "perfect", "inverted", "negative"]


def sklearn_metrics(scores: np.ndarray, labels: np.ndarray) -> tuple[float, float, float]:
    precision, recall, _ = precision_recall_curve(labels, scores)
    total = precision + recall
    f1 = np.divide(2 * precision * recall, total, out=np.zeros_like(total), where=total > 0).max()
    return roc_auc_score(labels, scores), average_precision_score(labels, scores), f1


def official_aupro(maps: np.ndarray, masks: np.ndarray) -> float:
    """Area under the official curve up to the limit, with the last piece cut at the limit, over the limit."""
    metric = PerRegionOverlap(thresholds=None, reference_implementation=True)
    metric.update(torch.from_numpy(maps.copy()), torch.from_numpy(masks.astype(np.int64)))
    points = zip(*(curve.double().tolist() for curve in metric.compute()), strict=True)
    area = 0.0
    for (left, low), (right, high) in itertools.pairwise(points):
        if left >= LIMIT:
            break
        if right > LIMIT:
            high = low + (high - low) * (LIMIT - left) / (right - left)
            right = LIMIT
        area += (right - left) * (low + high) / 2
    return area / LIMIT


def slow_dinomaly_aupro(maps: np.ndarray, masks: np.ndarray) -> float | None:
    """Dinomaly's definition, threshold by threshold and region by region."""
    labelled = [ndimage.label(mask, EIGHT_CONNECTED) for mask in masks]
    low, high = float(maps.min()), float(maps.max())
    points = []
    for index in range(200):
        predicted = maps > low + index * (high - low) / 200
        overlaps = [
            predicted[image][regions == region].mean()
            for image, (regions, count) in enumerate(labelled)
            for region in range(1, count + 1)
        ]
        rate = predicted[~masks].mean()
        if rate < LIMIT:
            points.append((rate, float(np.mean(overlaps))))
    largest = max(rate for rate, _ in points)
    if largest == 0:
        return None
    area = 0.0
    for (rate, overlap), (next_rate, next_overlap) in itertools.pairwise(points):
        area += (rate - next_rate) / largest * (overlap + next_overlap) / 2  # rates fall with the threshold
    return area


def image_values(metrics: Metrics) -> tuple:
    return metrics.image_auroc, metrics.image_ap, metrics.image_f1


def pixel_values(metrics: Metrics) -> tuple:
    return metrics.pixel_auroc, metrics.pixel_ap, metrics.pixel_f1, metrics.aupro


@pytest.mark.parametrize("kind", KINDS)
def test_pixel_auroc_ap_f1_equal_scikit_learn(kind):
    masks = truth()
    maps = score_maps(kind, masks)
    assert pixel_metrics(maps, masks)[:3] == pytest.approx(sklearn_metrics(maps.ravel(), masks.ravel()), abs=1e-12)


@pytest.mark.parametrize("decimals", [None, 1, 0])
@pytest.mark.parametrize("count", [2, 7, 150])
def test_image_auroc_ap_f1_equal_scikit_learn(count, decimals):
    generator = np.random.default_rng(count)
    labels = np.arange(count) % 3 == 1
    scores = generator.normal(0, 1, count) + labels
    scores = scores if decimals is None else scores.round(decimals)
    assert ranking_metrics(scores, labels.astype(np.int64)) == pytest.approx(sklearn_metrics(scores, labels), abs=1e-12)


def test_image_metrics_of_constant_and_of_perfect_scores():
    labels = np.array([0, 1, 0, 1, 1])
    assert ranking_metrics(np.full(5, 2.0), labels) == pytest.approx((0.5, 0.6, 0.75))
    assert ranking_metrics(labels.astype(np.float32), labels) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(40, 40), (36, 61)])
def test_aupro_equals_the_official_curve(kind, shape):
    masks = truth(*shape)
    maps = score_maps(kind, masks)
    assert pixel_metrics(maps, masks)[3] == pytest.approx(official_aupro(maps, masks), abs=1e-6)


@pytest.mark.parametrize("columns", [slice(3, 4), slice(2, 5)])
def test_aupro_of_a_ramp_across_the_region_is_half_the_limit(columns):
    """Every threshold covers the same share of defect and background, so the curve is the diagonal."""
    maps = np.repeat(np.arange(400.0)[:, None], 7, axis=1)[None]
    masks = np.zeros((1, 400, 7), dtype=bool)
    masks[0, :, columns] = True
    assert pixel_metrics(maps, masks)[3] == pytest.approx(0.15, abs=1e-12)


# A single row of pixels: ten negatives of scores 1 to 10 (or as given), each defect pixel a region of its own.
ROW_CASES = {
    "one region above all, one found at FPR 0.2": ([11, 8.5], range(1, 11), (0.5 * 0.2 + 1 * 0.1) / 0.3),
    "tied with one negative: slope from FPR 0.1 to 0.2": ([9], range(1, 11), (0.1 * 0.5 + 0.1 * 1) / 0.3),
    "tied across the limit, FPR 0.2 to 0.4": ([8], [10, 9, 8, 8, 7, 6, 5, 4, 3, 2], 0.1 * 0.5 / 2 / 0.3),
    "found exactly at the limit": ([7.5], range(1, 11), 0.0),
    "tie ends exactly at the limit": ([8], range(1, 11), 0.1 * 0.5 / 0.3),
    "found after the limit": ([5.5], range(1, 11), 0.0),
    "all four kinds": ([11, 9, 5.5, 8.5], range(1, 11), (1 + 0.5 + 0 + 1 / 3) / 4),
}


@pytest.mark.parametrize(("defects", "negatives", "expected"), ROW_CASES.values(), ids=ROW_CASES)
def test_aupro_of_hand_computed_rows(defects, negatives, expected):
    negatives = list(negatives)
    scores, mask = [], []
    for defect in defects:
        scores += [defect, negatives.pop()]
        mask += [True, False]
    maps, masks = np.array([[scores + negatives]], dtype=float), np.array([[mask + [False] * len(negatives)]])
    assert pixel_metrics(maps, masks)[3] == pytest.approx(expected, abs=1e-12)


def test_aupro_weighs_a_pixel_and_a_thousand_pixels_alike():
    masks = np.zeros((1, 50, 50), dtype=bool)
    masks[0, 5:30, 5:45] = masks[0, 45, 45] = True
    maps = np.random.default_rng(0).random((1, 50, 50))
    maps[0, 45, 45] = 9.0
    maps[0, 5:30, 5:45] = -1.0
    assert pixel_metrics(maps, masks)[3] == pytest.approx(0.5)
    maps[0, 5:30, 5:45], maps[0, 45, 45] = 9.0, -1.0
    assert pixel_metrics(maps, masks)[3] == pytest.approx(0.5)


def test_pixels_touching_at_a_corner_are_one_region():
    masks = np.zeros((1, 8, 8), dtype=bool)
    masks[0, 1, 1:4] = masks[0, 2, 4] = True  # three pixels and a fourth at their corner
    masks[0, 6, 1] = True
    maps = np.zeros((1, 8, 8))
    maps[0, 2, 4] = 1.0  # a quarter of the large region; as a region of its own it would be a third of all
    rest_at_the_end = 0.15  # what is found with all negatives at once contributes half the limit
    expected = (0.25 + 0.75 * rest_at_the_end + rest_at_the_end) / 2
    assert pixel_metrics(maps, masks)[3] == pytest.approx(expected, abs=1e-12)


def test_regions_of_neighbouring_images_stay_apart():
    """The last row of one image and the first of the next are no neighbours."""
    masks = np.zeros((2, 6, 6), dtype=bool)
    masks[0, 5, 0:2] = masks[1, 0, 0:2] = masks[1, 1, 0:2] = True
    maps = np.zeros((2, 6, 6))
    maps[0, 5, 0:2] = 1.0
    assert pixel_metrics(maps, masks)[3] == pytest.approx((1 + 0.15) / 2, abs=1e-12)


def test_constant_and_perfect_maps():
    masks = truth()
    share = masks.mean()
    constant = pixel_metrics(score_maps("constant", masks), masks)
    assert constant == pytest.approx((0.5, share, 2 * share / (1 + share), 0.15), abs=1e-12)
    assert pixel_metrics(score_maps("perfect", masks), masks) == pytest.approx((1, 1, 1, 1), abs=1e-12)


@pytest.mark.parametrize("transform", ["exp", "rank", "affine"])
@pytest.mark.parametrize("kind", ["plain", "tied", "outliers"])
def test_monotone_transforms_change_nothing(kind, transform):
    masks = truth()
    maps = score_maps(kind, masks)
    transformed = {
        "exp": lambda: np.exp(maps),
        "rank": lambda: stats.rankdata(maps, method="dense").reshape(maps.shape),
        "affine": lambda: 8 * maps - 3,
    }[transform]()
    assert pixel_metrics(transformed, masks) == pytest.approx(pixel_metrics(maps, masks), abs=1e-12)


@pytest.mark.parametrize("pro_mode", ["exact", "dinomaly"])
def test_order_of_images_changes_nothing(pro_mode):
    masks = truth()
    maps = score_maps("tied", masks)
    order = np.random.default_rng(1).permutation(len(masks))
    shuffled = pixel_metrics(maps[order], masks[order], pro_mode)
    assert shuffled == pytest.approx(pixel_metrics(maps, masks, pro_mode), abs=1e-12)


def test_transposed_images_change_nothing():
    masks = truth(36, 61)
    maps = score_maps("plain", masks)
    turned = pixel_metrics(maps.transpose(0, 2, 1).copy(), masks.transpose(0, 2, 1).copy())
    assert turned == pytest.approx(pixel_metrics(maps, masks), abs=1e-12)


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.float32])
@pytest.mark.parametrize("value", [1, 255])
def test_masks_of_any_type(dtype, value):
    masks = truth()
    maps = score_maps("tied", masks)
    assert pixel_metrics(maps, masks.astype(dtype) * dtype(value)) == pixel_metrics(maps, masks)


@pytest.mark.parametrize("pro_mode", ["exact", "dinomaly"])
@pytest.mark.parametrize("defective", [False, True])
def test_pixel_metrics_need_both_classes(defective, pro_mode):
    maps = np.random.default_rng(0).random((3, 8, 8))
    assert pixel_metrics(maps, np.full(maps.shape, defective), pro_mode) == (None, None, None, None)


@pytest.mark.parametrize("label", [0, 1])
def test_image_metrics_need_both_classes(label):
    assert ranking_metrics(np.arange(4.0), np.full(4, label)) == (None, None, None)


def test_counts_beyond_32_bits():
    """Two million pixels: the sum of all ranks is about 2e12."""
    side = 1400
    masks = np.zeros((1, side, side), dtype=bool)
    masks[0, :, : side // 2] = True
    maps = np.where(masks, 0, 1).astype(np.uint8)
    assert pixel_metrics(maps, masks) == pytest.approx((0, 0.5, 2 / 3, 0), abs=1e-12)
    assert pixel_metrics(1 - maps, masks) == pytest.approx((1, 1, 1, 1), abs=1e-12)
    assert pixel_metrics(np.zeros_like(maps), masks) == pytest.approx((0.5, 0.5, 2 / 3, 0.15), abs=1e-12)


@pytest.mark.parametrize("kind", ["plain", "useless", "two values", "outliers", "negative"])
@pytest.mark.parametrize("shape", [(40, 40), (36, 61)])
def test_dinomaly_mode_equals_a_plain_loop(kind, shape):
    masks = truth(*shape)
    maps = score_maps(kind, masks)
    assert pixel_metrics(maps, masks, "dinomaly")[3] == pytest.approx(slow_dinomaly_aupro(maps, masks), abs=1e-9)


def test_dinomaly_mode_changes_only_aupro():
    masks = truth()
    maps = score_maps("plain", masks)
    exact, dinomaly = pixel_metrics(maps, masks, "exact"), pixel_metrics(maps, masks, "dinomaly")
    assert dinomaly[:3] == exact[:3]
    assert dinomaly[3] != pytest.approx(exact[3], abs=1e-6)


@pytest.mark.parametrize("kind", ["perfect", "constant"])
def test_dinomaly_mode_has_no_value_without_false_positives(kind):
    masks = truth()
    assert pixel_metrics(score_maps(kind, masks), masks, "dinomaly")[3] is None


def test_images_without_pixel_truth_count_at_image_level_only():
    masks = truth()
    maps = score_maps("plain", masks)
    labels, scores = masks.any(axis=(1, 2)).astype(np.int64), maps.max(axis=(1, 2))
    known = np.ones(len(masks), dtype=bool)
    known[[0, 3]] = False
    masks[[0, 3]] = False  # defective images whose mask is absent
    metrics = compute_metrics(scores, labels, maps, masks, known)
    assert image_values(metrics) == pytest.approx(sklearn_metrics(scores, labels), abs=1e-12)
    expected = (*sklearn_metrics(maps[known].ravel(), masks[known].ravel()), official_aupro(maps[known], masks[known]))
    assert pixel_values(metrics) == pytest.approx(expected, abs=1e-6)


def test_no_pixel_truth_at_all_leaves_the_image_metrics():
    masks = np.zeros((4, 6, 6), dtype=bool)
    maps = np.random.default_rng(0).random(masks.shape)
    labels = np.array([0, 1, 0, 1])
    metrics = compute_metrics(np.arange(4.0), labels, maps, masks, labels == 0)
    assert image_values(metrics) == pytest.approx((0.75, 5 / 6, 0.8), abs=1e-12)
    assert pixel_values(metrics) == (None,) * 4


def test_names_are_those_of_the_results_file():
    values = named(Metrics(1, 2, 3, 4, 5, 6, 7))
    assert values == {"I-AUROC": 1, "I-AP": 2, "I-F1": 3, "P-AUROC": 4, "P-AP": 5, "P-F1": 6, "AUPRO": 7}


def test_mean_is_unweighted_and_skips_absent_values():
    rows = [dict.fromkeys(METRIC_NAMES, value) for value in (0.25, 0.75, 0.5)]
    rows[0]["AUPRO"] = rows[1]["P-AP"] = rows[2]["P-AP"] = None
    for row in rows:
        row["P-F1"] = None
    means = mean_metrics(rows)
    assert (means["I-AUROC"], means["AUPRO"], means["P-AP"], means["P-F1"]) == (0.5, 0.625, 0.25, None)
    assert tuple(means) == METRIC_NAMES
