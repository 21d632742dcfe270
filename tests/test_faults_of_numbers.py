"""Numbers stay numbers: what has no value is an empty cell and n/a, never 0 or nan, through the real commands."""

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from tests.entry_scripts import INP_SINGLE, RAAD, every_entry_script
from tests.miniature import make_mvtec, save
from utils.metrics import METRIC_NAMES

IMAGE_METRICS, PIXEL_METRICS = METRIC_NAMES[:3], METRIC_NAMES[3:]


def rows_of(folder: Path) -> dict[str, dict[str, str]]:
    """The table of results, checked: every cell is empty or a fraction, and no file for readers says nan."""
    rows = {row["item"]: row for row in csv.DictReader((folder / "results.csv").open())}
    for row in rows.values():
        assert all(cell == "" or 0 <= float(cell) <= 1 for name, cell in row.items() if name != "item")
    for path in (folder / "report.html", folder / "log.txt", folder / "metrics.jsonl"):
        words = path.read_text().lower().replace(">", " ").replace("<", " ").replace(",", " ").replace(":", " ").split()
        assert "nan" not in words
    return rows


def values(row: dict[str, str], names=METRIC_NAMES) -> list[str]:
    return [row[name] for name in names]


def trained(commands, script, tmp_path: Path, data: Path, *flags: str, plug: str | None = None) -> tuple[dict, str]:
    """Rows of a run, and what it printed."""
    finished = commands.run(*script.words(tmp_path, data, *flags), plug=plug)
    assert finished.code == 0, finished.err
    assert "Warning" not in finished.err  # of numpy, sklearn, torch: a division by zero and the like
    return rows_of(script.folder(tmp_path)), finished.out + finished.err


@every_entry_script
def test_one_class_alone_has_no_image_metrics_and_the_mean_leaves_it_out(commands, tmp_path, script):
    """Case 4."""
    data = make_mvtec(tmp_path / "data", items=("bottle", "nut"))
    for kind in ("test", "ground_truth"):
        shutil.rmtree(data / "nut" / kind / "hole")
    rows, printed = trained(commands, script, tmp_path, data)
    assert values(rows["nut"]) == [""] * 7
    assert "" not in values(rows["bottle"])
    assert values(rows["Mean"]) == values(rows["bottle"])
    assert "nut: the test images are all of one class; image metrics do not exist" in printed
    assert f"n/a: not defined for that category; left out of the mean ({', '.join(METRIC_NAMES)}" in printed


@every_entry_script
def test_masks_that_mark_nothing_are_counted_and_leave_no_pixel_metrics(commands, tmp_path, mvtec, script):
    """Case 9, of all masks."""
    for path in (mvtec / "bottle" / "ground_truth" / "hole").iterdir():
        save(path, np.zeros((64, 64), np.uint8))
    rows, printed = trained(commands, script, tmp_path, mvtec)
    assert values(rows["bottle"], PIXEL_METRICS) == [""] * 4
    assert "" not in values(rows["bottle"], IMAGE_METRICS)
    assert "bottle: 3 defective images have a mask that marks nothing" in printed


def test_one_mask_that_marks_nothing_is_a_warning_and_the_others_count(commands, tmp_path, mvtec):
    """Case 9."""
    save(mvtec / "bottle" / "ground_truth" / "hole" / "001_mask.png", np.zeros((64, 64), np.uint8))
    rows, printed = trained(commands, INP_SINGLE, tmp_path, mvtec)
    assert "" not in values(rows["bottle"])
    assert "bottle: 1 defective images have a mask that marks nothing" in printed


def constant_map_row(commands, script, tmp_path, data, *flags: str) -> dict[str, str]:
    """The row of three good and three defective images whose maps have one value, by hand and by scikit-learn.

    A pixel is a defect with probability p: AP is p and the best F1 2p / (1 + p). AUPRO is the mean of overlap = FPR up to 0.3.
    """
    flags = ("--smoothing_kernel", "0", "--metric_size", "64", *flags)
    rows, _ = trained(commands, script, tmp_path, data, *flags, plug="tests.plugs:maps_are:0.5")
    row = rows["bottle"]
    scores = list(csv.DictReader((script.folder(tmp_path) / "bottle" / "scores.csv").open()))
    labels, numbers = [int(line["label"]) for line in scores], [float(line["score"]) for line in scores]
    assert set(numbers) == {0.5}
    assert float(row["I-AUROC"]) == roc_auc_score(labels, numbers) == 0.5
    assert float(row["I-AP"]) == average_precision_score(labels, numbers) == 0.5
    assert values(row, ("I-F1", "P-AUROC", "AUPRO")) == ["0.6667", "0.5000", "0.1500"]
    share = float(row["P-AP"])
    assert 0 < share < 0.2
    assert float(row["P-F1"]) == pytest.approx(2 * share / (1 + share), abs=2e-4)  # the share is rounded
    return row


@every_entry_script
def test_constant_maps(commands, tmp_path, mvtec, script):
    """Case 36."""
    constant_map_row(commands, script, tmp_path, mvtec)


def test_constant_maps_in_bins(commands, tmp_path):
    """Case 36, with the memory for exact metrics exceeded."""
    data = make_mvtec(tmp_path / "data", good=40, defective=40)
    row = constant_map_row(commands, INP_SINGLE, tmp_path, data, "--metrics_memory", "0.001")
    assert "" not in values(row)
    assert "bins" in (INP_SINGLE.folder(tmp_path) / "log.txt").read_text()


@every_entry_script
def test_outliers_of_1e30_stretch_nothing(commands, tmp_path, mvtec, script):
    """Every second image has one pixel of 1e30: metrics are ranks, so all stay defined, and pictures are drawn."""
    flags = ("--smoothing_kernel", "0", "--max_ratio", "0")
    rows, _ = trained(commands, script, tmp_path, mvtec, *flags, plug="tests.plugs:maps_have:1e30")
    folder = script.folder(tmp_path) / "bottle"
    scores = list(csv.DictReader((folder / "scores.csv").open()))
    labels, numbers = [int(line["label"]) for line in scores], [float(line["score"]) for line in scores]
    assert sum(number > 1e29 for number in numbers) == 3
    assert float(rows["bottle"]["I-AUROC"]) == pytest.approx(roc_auc_score(labels, numbers), abs=5e-5)
    assert float(rows["bottle"]["I-AP"]) == pytest.approx(average_precision_score(labels, numbers), abs=5e-5)
    assert "" not in values(rows["bottle"])
    assert (folder / "maps" / "contact_sheet.jpg").stat().st_size > 1000


def check_refused_map(commands, script, tmp_path, mvtec, plug: str) -> None:
    finished = commands.run(*script.words(tmp_path, mvtec), plug=plug)
    assert finished.code == 3
    assert "is not finite" in finished.sentence
    assert str(mvtec / "bottle") in finished.sentence
    assert not (script.folder(tmp_path) / "results.csv").exists()


@every_entry_script
def test_a_map_with_one_nan_names_its_image(commands, tmp_path, mvtec, script):
    """Case 35."""
    check_refused_map(commands, script, tmp_path, mvtec, "tests.plugs:maps_have:nan")


@pytest.mark.parametrize("plug", ["maps_have:inf", "maps_have:-inf", "maps_are:nan"])
def test_maps_that_are_not_finite(commands, tmp_path, mvtec, plug):
    """Case 35."""
    check_refused_map(commands, INP_SINGLE, tmp_path, mvtec, f"tests.plugs:{plug}")


@every_entry_script
def test_constant_images(commands, tmp_path, mvtec, script):
    """Photographs of one colour alone, in training and test: no division by a spread of zero."""
    for path in mvtec.rglob("*.png"):
        if "ground_truth" not in path.parts:
            save(path, np.full((64, 64, 3), 90, np.uint8))
    if script is RAAD:  # its maps are divided by the spread of those of normal images
        refused = commands.run(*script.words(tmp_path, mvtec))
        assert refused.code == 3
        assert "on normal images, which give it no scale" in refused.sentence
        return
    rows, _ = trained(commands, script, tmp_path, mvtec)
    assert "" not in values(rows["bottle"])
    assert values(rows["bottle"], ("I-AUROC", "I-AP", "I-F1")) == ["0.5000", "0.5000", "0.6667"]


def test_the_comparison_of_runs_says_na_where_a_metric_is_not_defined(commands, tmp_path):
    data = make_mvtec(tmp_path / "data", masks=False)
    trained(commands, INP_SINGLE, tmp_path, data)
    page, table = tmp_path / "page.html", tmp_path / "table.csv"
    finished = commands.run("scripts.report", str(INP_SINGLE.folder(tmp_path)), "--html", str(page), "--csv", str(table))
    assert finished.code == 0, finished.err
    assert "n/a" in finished.out
    assert "nan" not in (finished.out + page.read_text() + table.read_text()).lower().split()
    for row in csv.DictReader(table.open()):
        assert values(row, PIXEL_METRICS) == [""] * 4
