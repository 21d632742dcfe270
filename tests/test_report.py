"""Tables, result files, pictures and the HTML page."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from common.errors import UserError
from datasets.catalog import ListingOptions
from tests.miniature import save
from tests.run_folders import make_run
from utils.evaluation import Evaluation
from utils.metrics import METRIC_NAMES
from utils.pictures import heat_map, model_view, outline, outline_level, pick_worst_and_best, write_contact_sheet
from utils.report import format_results, points_at_most, write_run_report
from utils.result_files import MetricsLog, read_metrics, read_results, write_pixel_errors, write_results, write_scores
from utils.settings import DataOptions

CALIBRATION = {"map_median": 0.1, "map_limit": 0.3}
FULL = dict.fromkeys(METRIC_NAMES, 0.98765)


def row(**known: float) -> dict:
    return {name: known.get(name.replace("-", "_")) for name in METRIC_NAMES}


def test_results_round_trip_and_mean(tmp_path):
    path = tmp_path / "results.csv"
    rows = {"=sum": row(I_AUROC=1.0, AUPRO=0.5), "'quoted": row(I_AUROC=0.5), "küche, links": row()}
    write_results(path, rows)
    assert read_results(path) == rows
    lines = path.read_text().splitlines()
    assert lines[0] == "item,I-AUROC,I-AP,I-F1,P-AUROC,P-AP,P-F1,AUPRO"
    assert lines[1].startswith("'=sum,1.0000,,,,,,0.5000")
    assert lines[-1] == "Mean,0.7500,,,,,,0.5000"


@pytest.mark.parametrize("text", ["", "a,b\n", "item,I-AUROC,I-AP,I-F1,P-AUROC,P-AP,P-F1,AUPRO\nbottle,0.5,0."])
def test_damaged_results_are_named(tmp_path, text):
    path = tmp_path / "results.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=r"results\.csv"):
        read_results(path)


def test_formulas_never_reach_a_spreadsheet(tmp_path):
    write_scores(tmp_path / "scores.csv", [("@cmd", "-item", 1, 0.25)])
    assert (tmp_path / "scores.csv").read_text().splitlines()[1] == "'@cmd,'-item,1,0.250000"


def test_table_in_percent_says_what_is_missing():
    text = format_results({"a": FULL, "b": row(I_AUROC=0.5)})
    assert re.search(r"^a +98\.77( +98\.77){6}$", text, re.M)
    assert re.search(r"^b +50\.00( +n/a){6}$", text, re.M)
    assert re.search(r"^Mean +74\.38( +98\.77){6}$", text, re.M)
    assert "left out of the mean (I-AP, I-F1, P-AUROC, P-AP, P-F1, AUPRO)" in text
    assert "n/a" not in format_results({"a": FULL})


def test_metrics_log_forgets_what_will_be_repeated(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for item in ("a", "b"):
        log = MetricsLog(path, item)
        for iteration in (10, 20, 30):
            log.training(iteration, 0.5, 1e-3, 0.1, {"reconstruction": 0.5})
        log.append("evaluation", AUPRO=0.9)
    MetricsLog(path, "b").truncate(20)
    assert [(line["item"], line.get("iteration")) for line in read_metrics(path)] == [
        *(("a", iteration) for iteration in (10, 20, 30, None)),
        *(("b", iteration) for iteration in (10, 20)),
    ]
    with path.open("a") as file:
        file.write('{"item": "b", "ki')
    assert len(read_metrics(path)) == 6
    assert all(json.dumps(line) for line in read_metrics(path))


def test_worst_and_best_images():
    scores = np.array([0.1, 0.9, 0.2, 0.8, 0.3, 0.7, 0.4, 0.6])
    labels = np.array([0, 0, 0, 0, 1, 1, 1, 1])
    worst, best = pick_worst_and_best(scores, labels)
    assert [pick.index for pick in worst] == [4, 6, 7, 1, 3, 2]
    assert [pick.index for pick in best] == [5, 7, 6, 0, 2, 3]
    worst, best = pick_worst_and_best(scores[:1], labels[:1])
    assert [pick.index for pick in worst] == [pick.index for pick in best] == [0]


def test_heat_map_has_a_fixed_scale_on_which_normal_is_dark():
    normal, defect = np.full((8, 8), 0.1), np.full((8, 8), 0.1)
    normal[0, 0], defect[2, 2], defect[3, 3] = 0.3, 0.3, 0.7
    first, second = heat_map(normal, CALIBRATION), heat_map(defect, CALIBRATION)
    assert first.mean() < 10
    np.testing.assert_array_equal(first[0, 0], second[2, 2])
    assert second[3, 3].sum() > 2 * first[0, 0].sum()
    np.testing.assert_array_equal(heat_map(defect + 9, CALIBRATION)[0, 0], second[3, 3])


def test_outline_is_drawn_at_the_border_only():
    region = np.zeros((40, 40), bool)
    region[10:30, 10:30] = True
    image = np.zeros((40, 40, 3), np.uint8)
    drawn = outline(image, region, (255, 0, 0)).any(axis=2)
    assert drawn[10, 10:30].all()
    assert not drawn[15:25, 15:25].any()
    assert not drawn[:7].any()
    assert not image.any()
    assert CALIBRATION["map_limit"] < outline_level(CALIBRATION)


def test_contact_sheet_of_few_images_without_masks(tmp_path):
    path = save(tmp_path / "gut\nteil.png", np.full((30, 50, 3), 80, np.uint8))
    maps = np.full((1, 256, 256), 0.2, np.float32)
    evaluation = Evaluation([str(path)], np.array([1]), np.array([0.2]), maps, maps > 9, np.array([False]))
    data = DataOptions("Folder", None, None, ListingOptions(), None, 64, 56, 10**6, False, "off")
    write_contact_sheet(tmp_path / "maps" / "sheet.jpg", evaluation, CALIBRATION, data)
    assert Image.open(tmp_path / "maps" / "sheet.jpg").size[0] > 1000


def test_pictures_show_what_a_bicubic_model_sees_at_the_maps_size(tmp_path):
    photo = np.random.default_rng(0).integers(0, 255, (30, 50, 3), dtype=np.uint8)
    path = save(tmp_path / "a.png", photo)
    data = DataOptions("Folder", None, None, ListingOptions(), None, 64, 56, 10**6, False, "off", "bicubic")
    resized = Image.fromarray(photo).resize((64, 64), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(model_view(path, data, 56), np.asarray(resized)[4:-4, 4:-4])


@pytest.mark.parametrize("side", [128, 256, 1000])
def test_contact_sheet_looks_alike_whatever_the_maps_size(tmp_path, side):
    """Its fourth tile: a defect found at its upper left quarter, outlined in red at the same place and about as wide."""
    path = save(tmp_path / "a.png", np.zeros((30, 50, 3), np.uint8))
    found = np.zeros((1, side, side), np.float32)
    found[0, side // 4 : side // 2, side // 4 : side // 2] = 9.0
    evaluation = Evaluation([str(path)], np.array([1]), np.array([0.2]), found, np.zeros(found.shape, bool), np.array([True]))
    data = DataOptions("Folder", None, None, ListingOptions(), None, 64, 56, 10**6, False, "off")
    write_contact_sheet(tmp_path / "sheet.jpg", evaluation, CALIBRATION, data)
    tile = np.asarray(Image.open(tmp_path / "sheet.jpg"))[66:242, 552:728, 0]
    marked = np.argwhere(tile > 100)
    assert marked.min(axis=0) == pytest.approx([44, 44], abs=3)
    assert marked.max(axis=0) == pytest.approx([88, 88], abs=3)
    assert len(marked) == pytest.approx(4 * 44 * 2, rel=0.5)


def test_report_of_one_model_shows_its_loss_once_and_every_category_of_every_data_set(tmp_path):
    rows = {"MVTec-AD/bottle": row(I_AUROC=1.0), "MVTec-AD/cable": row(I_AUROC=0.5), "VisA/candle": row(I_AUROC=0.6)}
    flags = ("--dataset", "MVTec-AD+VisA", "--data_path", "one", "two")
    folder = make_run(tmp_path, {**rows, "VisA/cashew": {**row(), "AU-sPRO": 0.25}}, *flags, setting="multi")
    log = MetricsLog(folder / "metrics.jsonl", "multi")
    for iteration in (10, 20):
        log.training(iteration, 1.0 / iteration, 1e-3, 0.1, {})
    write_scores(folder / "VisA" / "candle" / "scores.csv", [("a", "VisA/candle", 0, 0.1), ("b", "VisA/candle", 1, 0.3)])
    write_run_report(folder)
    page = (folder / "report.html").read_text()
    assert page.count("training loss by iteration") == page.count("training loss by iteration: multi") == 1
    assert page.count("test images by score") == 1
    assert page.index("<h2>VisA/candle</h2>") < page.index("test images by score") < page.index("<h2>VisA/cashew</h2>")
    cells = {name: re.search(rf"<tr><td>{name}</td>(.*?)</tr>", page)[1] for name in ("Mean MVTec-AD", "Mean VisA", "Mean")}
    assert [re.findall(r"<td>([^<]*)</td>", text)[0] for text in cells.values()] == ["75.00", "60.00", "70.00"]
    assert re.findall(r"<td>([^<]*)</td>", cells["Mean VisA"])[-1] == "25.00"


def test_report_says_which_pixel_metrics_come_from_bins(tmp_path):
    folder = make_run(tmp_path, {"bottle": row(P_AP=0.5), "<b>": row(P_AP=0.5), "cable": row(P_AP=0.5)})
    write_run_report(folder)
    assert "bins" not in (folder / "report.html").read_text()
    write_pixel_errors(folder / "pixel_errors.csv", {"bottle": 0.00012, "<b>": 0.000153, "deleted": 0.5})
    write_run_report(folder)
    note = "pixel metrics of bottle, &lt;b&gt; come from bins, off by at most 0.02 points<"  # 0.0153, rounded up
    assert note in (folder / "report.html").read_text()


@pytest.mark.parametrize(("error", "points"), [(0.0, "0.01"), (0.000001, "0.01"), (0.0002, "0.02"), (0.03001, "3.01")])
def test_a_largest_error_is_never_rounded_down(error, points):
    assert points_at_most(error) == points
