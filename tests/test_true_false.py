"""RAAD's TRUE and FALSE of pixels: recall and 1 - precision at a threshold that is stated."""

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from common.errors import UserError
from datasets.catalog import LAYOUTS
from datasets.records import Record
from tests.run_folders import make_run, row
from tests.test_raad_tables import settings
from utils.evaluation import Evaluation, calibrate_scale
from utils.hosts import VARAD
from utils.measurement import measurement_of
from utils.metrics import PixelMetrics, collected_pixel_metrics
from utils.pixel_scores import ExactPixelScores, HistogramPixelScores
from utils.protocol import EvaluationOptions
from utils.run_folder import RunFolder
from utils.settings import IDENTITY_KEYS, PROTOCOL_KEYS, changed_protocol


def collected(maps, masks, kind=ExactPixelScores) -> ExactPixelScores | HistogramPixelScores:
    maps, masks = np.asarray(maps, np.float32), np.asarray(masks, bool)
    scores = kind(maps.size) if kind is ExactPixelScores else kind()
    scores.add(maps, masks, np.ones(len(maps), bool))
    return scores


def true_false(maps, masks, rule: str) -> tuple[float | None, float | None]:
    metrics = collected_pixel_metrics(collected(maps, masks), true_false=rule)
    return metrics.recall, metrics.false_share


# two images of 2 x 3 pixels: 4 defect pixels, 3 of them in the first image
MAPS = [[[0.9, 0.8, 0.1], [0.7, 0.6, 0.2]], [[0.3, 0.0, 0.1], [0.5, 0.8, 0.2]]]
MASKS = [[[1, 1, 0], [0, 1, 0]], [[0, 0, 0], [0, 0, 1]]]


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("fixed:0.95", (0.0, None)),  # nothing is marked
        ("fixed:0.85", (1 / 4, 0.0)),
        ("fixed:0.8", (2 / 4, 1 / 3)),  # a pixel of that very score is marked, in both images
        ("fixed:0.65", (2 / 4, 2 / 4)),
        ("fixed:0.2", (4 / 4, 5 / 9)),
        ("fixed:-3.0", (4 / 4, 8 / 12)),
        ("f1max", (3 / 4, 2 / 5)),  # >= 0.6 has F1 2/3; 0.2 has 8/13, 0.8 has 4/7
    ],
)
def test_true_and_false_of_hand_made_masks_are_pooled_over_all_pixels(rule, expected):
    assert true_false(MAPS, MASKS, rule) == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(5))
def test_true_and_false_at_the_best_f1_are_those_of_the_plain_formulas(seed):
    generator = np.random.default_rng(seed)
    masks = generator.random((4, 9, 9)) < 0.2
    maps = np.round(generator.random((4, 9, 9)) + 0.5 * masks, 1).astype(np.float32)  # with many ties
    found = []
    for threshold in np.unique(maps)[::-1]:
        marked = maps >= threshold
        hits = (marked & masks).sum()
        found.append((2 * hits / (marked.sum() + masks.sum()), hits / masks.sum(), 1 - hits / marked.sum()))
    best = max(found, key=lambda values: values[0])  # of equal ones the first, with the highest threshold
    metrics = collected_pixel_metrics(collected(maps, masks), true_false="f1max")
    assert (metrics.f1, metrics.recall, metrics.false_share) == pytest.approx(best, abs=1e-12)
    precision = 1 - metrics.false_share
    assert 2 * metrics.recall * precision / (metrics.recall + precision) == pytest.approx(metrics.f1)


def test_of_two_thresholds_with_the_same_f1_the_higher_one_counts():
    maps, masks = [[[0.9, 0.8, 0.7, 0.6, 0.5]]], [[[1, 0, 0, 1, 0]]]  # F1 2/3 at 0.9 and at 0.6
    assert true_false(maps, masks, "f1max") == (0.5, 0.0)


def test_a_fixed_threshold_has_the_precision_of_the_maps():
    maps = np.array([[[0.1, 0.05]]], np.float32)  # the float32 next to 0.1 is more than 0.1, that next to 0.05 as well
    assert true_false(maps, [[[1, 0]]], "fixed:0.1") == (1.0, 0.0)
    assert true_false(-maps, [[[0, 1]]], "fixed:-0.1") == (1.0, 0.5)  # and that next to -0.1 is less


@pytest.mark.parametrize("rule", ["f1max", "fixed:0.5"])
@pytest.mark.parametrize("masks", [np.zeros((2, 2, 3)), np.ones((2, 2, 3))])
def test_true_and_false_do_not_exist_where_no_pixel_or_every_pixel_is_defective(rule, masks):
    assert true_false(MAPS, masks, rule) == (None, None)


def measured(rule: str, kind=ExactPixelScores, **further) -> dict[str, float | None]:
    records = [Record(Path(f"{index}.png"), index % 2, "bottle", (Path("mask.png"),) * (index % 2)) for index in range(2)]
    pixels = collected(MAPS, MASKS, kind)
    scores, nothing = np.array([0.1, 0.9]), np.full(2, np.nan)
    arguments = (records, scores, nothing, np.zeros(2, bool), pixels, "exact", "bottle", LAYOUTS["Folder"], 1.0)
    return measurement_of(*arguments, true_false=rule).metrics


def test_the_columns_come_last_and_only_if_they_are_wanted():
    usual, wanted = measured("off"), measured("f1max")
    assert list(wanted) == [*usual, "P-TRUE", "P-FALSE"]
    assert {name: wanted[name] for name in usual} == usual
    assert (wanted["P-TRUE"], wanted["P-FALSE"]) == pytest.approx((3 / 4, 2 / 5))
    plain = collected_pixel_metrics(collected(MAPS, MASKS))
    assert plain == replace(collected_pixel_metrics(collected(MAPS, MASKS), true_false="f1max"), recall=None, false_share=None)
    assert isinstance(plain, PixelMetrics)


def test_bins_leave_the_columns_empty_and_say_so(caplog):
    with caplog.at_level(logging.WARNING):
        assert measured("off", HistogramPixelScores).keys() & {"P-TRUE", "P-FALSE"} == set()
        assert "P-TRUE" not in caplog.text
        found = measured("f1max", HistogramPixelScores)
    assert (found["P-TRUE"], found["P-FALSE"]) == (None, None)
    assert found["P-F1"] == pytest.approx(2 / 3, abs=1e-3)
    assert "bottle: P-TRUE and P-FALSE stay empty" in caplog.text


def test_the_threshold_is_part_of_the_protocol_and_stated():
    off, best, fixed = (settings("--true_false", rule) for rule in ("off", "f1max", "fixed:0.50"))
    assert [made.evaluation.true_false for made in (off, best, fixed)] == ["off", "f1max", "fixed:0.5"]
    assert off.evaluation == replace(best.evaluation, true_false="off")
    plain = off.evaluation.describe()
    start = "; P-TRUE (recall) and P-FALSE (1 - precision): of all pixels of a category, at scores >= "
    assert best.evaluation.describe() == f"{plain}{start}the threshold of its best P-F1, chosen on the test images"
    assert fixed.evaluation.describe() == f"{plain}{start}0.5"
    assert changed_protocol(off.config, best) == ["true_false=f1max"]
    assert "true_false" in PROTOCOL_KEYS
    assert "true_false" not in IDENTITY_KEYS


def test_other_hosts_do_not_measure_them_and_neither_did_runs_from_before():
    usual = settings(host=VARAD)
    assert usual.evaluation.true_false == EvaluationOptions().true_false == "off"
    before = {key: value for key, value in usual.config.items() if key != "true_false"}
    assert changed_protocol(before, usual) == []
    assert EvaluationOptions.from_config(before) == usual.evaluation


def test_a_folder_from_before_belongs_to_runs_that_do_not_measure_them(tmp_path):
    run = RunFolder(make_run(tmp_path, {"bottle": row(0.9)}))
    before = {key: value for key, value in run.stored_config().items() if key != "true_false"}
    run.write_yaml("config.yaml", before)
    assert run.claim({**before, "true_false": "off"}, ["true_false"], {}, overwrite=False) is False
    assert run.claim({**before, "true_false": "f1max"}, ["true_false"], {}, overwrite=True) is True


@pytest.mark.parametrize(
    "rule", ["best", "fixed", "fixed:", "fixed:much", "fixed:nan", "fixed:inf", "f1max:0.5", "fixed:0.5:1"]
)
def test_another_rule_is_refused(rule, capsys):
    with pytest.raises(SystemExit) as end:
        settings("--true_false", rule)
    assert end.value.code == 2
    assert f"'{rule}' is not off, f1max, val_quantile or fixed:VALUE with a number" in capsys.readouterr().err


def test_the_threshold_of_normal_images_is_the_quantile_of_their_pixels():
    maps = np.random.default_rng(0).permutation(4000).reshape(10, 20, 20).astype(np.float32)
    masks = np.zeros(maps.shape, bool)
    calibration = calibrate_scale(Evaluation(["x"] * 10, np.zeros(10), maps.max(axis=(1, 2)), maps, masks, np.ones(10, bool)))
    assert calibration["map_threshold"] == pytest.approx(0.995 * 3999)  # linear between the pixels 0 ... 3999
    rule = settings("--true_false", "val_quantile").evaluation
    assert "the 0.995 quantile of the normal images" in rule.describe()
    assert rule.with_threshold(calibration) == replace(rule, true_false=f"fixed:{calibration['map_threshold']}")
    masks[0] = maps[0] >= 2000  # pixels from 3979.005 on are called defects
    expected = np.count_nonzero(maps[0] >= 3980) / np.count_nonzero(masks[0])
    found = true_false(maps, masks, rule.with_threshold(calibration).true_false)
    assert found[0] == pytest.approx(expected)
    assert found[1] == pytest.approx(1 - np.count_nonzero(maps[0] >= 3980) / 20)


def test_a_threshold_of_normal_images_needs_them():
    rule = settings("--true_false", "val_quantile").evaluation
    with pytest.raises(UserError, match="train it again, or give f1max"):
        rule.with_threshold({"map_median": 0.1})
    with pytest.raises(UserError, match="knows no normal images"):
        rule.with_threshold(None)
    fixed = settings("--true_false", "fixed:1").evaluation
    assert fixed.with_threshold(None) is fixed
