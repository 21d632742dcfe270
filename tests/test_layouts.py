"""Every layout of folders, csv and json: exact lists, and every way in which their files can be wrong."""

import csv
import json
import shutil

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from common.errors import UserError
from datasets.catalog import LAYOUTS, ListingOptions
from datasets.images import load_image, load_mask
from datasets.records import check_mask_sizes
from tests.conftest import run_folder
from tests.miniature import SIDE, save
from tests.miniature_layouts import (
    DEFECTIVE,
    GOOD,
    TRAIN,
    each_tree,
    make_btad,
    make_loco,
    make_realiad,
    make_visa,
    make_visa_downloaded,
    realiad_record,
    write_realiad_index,
    write_visa_split,
)


def listed(dataset, root, item, **options):
    layout = LAYOUTS[dataset]
    return tuple(part(root, item, ListingOptions(**options)) for part in (layout.train, layout.test))


def names(root, records):
    return [record.path.relative_to(root).as_posix() for record in records]


@each_tree
def test_counts_labels_kinds_and_masks(tmp_path, dataset, make, item, kinds):
    train, test = listed(dataset, make(tmp_path / "data"), item)
    assert item in LAYOUTS[dataset].categories(tmp_path / "data")
    assert (len(train), len(test)) == (TRAIN, GOOD + DEFECTIVE)
    assert {(record.label, record.masks, record.kind, record.item) for record in train} == {(0, (), "", item)}
    good, defective = ([record for record in test if record.label == label] for label in (0, 1))
    assert {(record.masks, record.kind) for record in good} == {((), "")}
    assert {kind: sum(record.kind == kind for record in defective) for kind in kinds} == kinds
    assert not {record.path for record in train} & {record.path for record in test}
    check_mask_sizes(test)
    for record in defective:  # the generators draw a red square of SIDE // 5, and a corner that only its mask shows
        marked = np.any([np.asarray(load_mask(path)) for path in record.masks], axis=0)
        assert marked.sum() == (SIDE // 5) ** 2 + (64 if len(record.masks) > 1 else 0)
        red, green, _ = np.moveaxis(np.asarray(load_image(record.path)).astype(int), 2, 0)
        assert np.median((red - green)[np.asarray(load_mask(record.masks[0])) > 0]) > 150


@each_tree
def test_training_and_evaluation_through_the_command_line(tmp_path, train, dataset, make, item, kinds):
    root = make(tmp_path / "data")
    assert train("--item", item, "--total_iters", "2", "--clb_stage", "0", dataset=dataset, data=root) == 0
    folder = run_folder(tmp_path, "INP-Former-Single-Class-FP", dataset)
    row, mean = csv.DictReader((folder / "results.csv").open())
    assert (row["item"], mean["item"]) == (item, "Mean")
    with (folder / item / "scores.csv").open(newline="") as file:
        scores = list(csv.DictReader(file))
    records = {str(record.path): record for record in listed(dataset, root, item)[1]}
    labels = [records[line["path"]].label for line in scores]
    assert len(scores) == len(records)
    assert labels == [int(line["label"]) for line in scores]
    assert float(row["I-AUROC"]) == pytest.approx(roc_auc_score(labels, [float(line["score"]) for line in scores]), abs=1e-4)
    assert 0 < float(row["P-AUROC"]) < 1


def test_visa_is_found_above_its_split_and_in_it(tmp_path):
    root = make_visa(tmp_path / "VisA_pytorch")
    assert listed("VisA", root, "candle") == listed("VisA", root / "1cls", "candle")
    assert names(root, listed("VisA", root, "candle")[1])[:4] == [
        "1cls/candle/test/bad/000.JPG",
        "1cls/candle/test/bad/001.JPG",
        "1cls/candle/test/bad/002.JPG",
        "1cls/candle/test/bad/003.JPG",
    ]


def test_visa_as_downloaded_follows_its_csv(tmp_path):
    root = make_visa_downloaded(tmp_path)
    train, test = listed("VisA", root, "candle")
    assert names(root, train) == [f"candle/Data/Images/Normal/00{index}.JPG" for index in (1, 2, 4, 5, 7, 8)]
    assert names(root, test)[:3] == [f"candle/Data/Images/Normal/00{index}.JPG" for index in (0, 3, 6)]
    assert [record.masks[0].relative_to(root).as_posix() for record in test[3:]] == [
        f"candle/Data/Masks/Anomaly/00{index}.png" for index in range(4)
    ]


HEADER = ("object", "split", "label", "image", "mask")
IMAGE, BAD, MASK = (
    "candle/Data/Images/Normal/000.JPG",
    "candle/Data/Images/Anomaly/000.JPG",
    "candle/Data/Masks/Anomaly/000.png",
)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([HEADER, ("candle", "test", "normal", "../../secret.JPG", "")], r"line 2 of .*1cls\.csv' points outside"),
        ([HEADER, ("candle", "test", "anomaly", BAD, "/etc/passwd")], "line 2 of .* points outside"),
        ([HEADER, ("candle", "test", "normal", "..\\secret.JPG", "")], "points outside"),
        ([HEADER, ("candle", "test", "normal", "C:secret.JPG", "")], "points outside"),
        ([HEADER, ("candle", "test", "strange", IMAGE, "")], "label 'strange'"),
        ([HEADER, ("candle", "valid", "normal", IMAGE, "")], "split 'valid'"),
        ([HEADER, ("candle", "test", "normal")], r"line 2 of .* has 3 of 5 cells"),
        ([HEADER, ("candle", "train", "normal", IMAGE, "")], "has no test images of 'candle'"),
        ([HEADER[:4], ("candle", "test", "normal", IMAGE)], "must have the columns object,split"),
        ([], "is empty"),
        ([HEADER, ("candle", "test", "normal", "x" * 200_000, "")], "is no csv"),
        ([HEADER, ("candle", "test", "normal", "candle/gone.JPG", "")], r"1 VisA images of 'candle' are missing: .*gone\.JPG"),
        ([HEADER, ("candle", "test", "anomaly", BAD, "")], r"1 defective VisA images of 'candle' have no mask: .*000\.JPG"),
        ([HEADER, ("candle", "test", "anomaly", BAD, "candle/gone.png")], "have no mask"),
    ],
)
def test_visa_csv_is_untrusted(tmp_path, lines, message):
    root = make_visa_downloaded(tmp_path)
    write_visa_split(root, lines)
    with pytest.raises(UserError, match=message):
        LAYOUTS["VisA"].test(root, "candle", ListingOptions())


def test_columns_of_a_visa_csv_may_stand_in_any_order(tmp_path):
    root = make_visa_downloaded(tmp_path)
    rows = [HEADER, ("candle", "test", "anomaly", BAD, MASK)]
    write_visa_split(root, rows)
    expected = LAYOUTS["VisA"].test(root, "candle", ListingOptions())
    write_visa_split(root, [("", *reversed(HEADER)), *(("0", *reversed(row)) for row in rows[1:])])
    assert LAYOUTS["VisA"].test(root, "candle", ListingOptions()) == expected


def test_visa_trains_on_no_defective_image(tmp_path):
    root = make_visa_downloaded(tmp_path)
    write_visa_split(root, [HEADER, ("candle", "train", "anomaly", BAD, MASK)])
    with pytest.raises(UserError, match=r"line 2 .* trains on the defective image"):
        LAYOUTS["VisA"].train(root, "candle", ListingOptions())


def test_realiad_json_folders(tmp_path):
    root = make_realiad(tmp_path)
    content = json.loads((root / "realiad_jsons/realiad_jsons/audiojack.json").read_text())
    defective = [record for record in content["test"] if record["anomaly_class"] != "OK"]
    noisy = content["train"] + defective[:1]
    write_realiad_index(root, "audiojack", noisy, defective[1:], "realiad_jsons_fuiad_0.1/realiad_jsons_fuiad_0.1")
    write_realiad_index(root, "audiojack", content["train"][:1], content["test"], "realiad_jsons_sv")
    train, test = listed("Real-IAD", root, "audiojack", realiad_json="realiad_jsons_fuiad_0.1")
    assert [record.label for record in train] == [0] * (TRAIN + 1)
    assert names(root, train[-1:]) == ["realiad_1024/audiojack/NG/HS/S0000/audiojack_0000_NG_HS_C1_20231021.jpg"]
    assert [(record.kind, record.masks[0].stem) for record in test] == [
        ("ZW", "audiojack_0001_NG_ZW_C1_20231021"),
        ("HS", "audiojack_0002_NG_HS_C1_20231021"),
        ("ZW", "audiojack_0003_NG_ZW_C1_20231021"),
    ]
    assert len(listed("Real-IAD", root, "audiojack", realiad_json="realiad_jsons_sv")[0]) == 1
    with pytest.raises(UserError, match=r"choose from realiad_jsons realiad_jsons_fuiad_0\.1 realiad_jsons_sv$"):
        listed("Real-IAD", root, "audiojack", realiad_json="realiad_jsons_sw")
    for name in ("../realiad_jsons", "/etc", "", "a/b"):
        with pytest.raises(UserError, match="must be the name of a folder"):
            listed("Real-IAD", root, "audiojack", realiad_json=name)


GOOD_RECORD = realiad_record("OK", "OK/S0000/audiojack_0000_OK_C1_20231021.jpg")
NG = "NG/HS/S0000/audiojack_0000_NG_HS_C1_20231021"


@pytest.mark.parametrize(
    ("test", "message"),
    [
        ([realiad_record("OK", "../../../secret.jpg")], "record 1 of 'test' in .*audiojack.json' points outside"),
        ([GOOD_RECORD, realiad_record("OK", "/etc/passwd")], "record 2 .* points outside"),
        ([realiad_record("HS", f"{NG}.jpg", "../mask.png")], r"points outside the data set: '\.\./mask\.png'"),
        ([realiad_record("XX", f"{NG}.jpg", f"{NG}.png")], "unknown anomaly_class 'XX'"),
        ([realiad_record(["HS"], f"{NG}.jpg", f"{NG}.png")], "unknown anomaly_class"),
        ([realiad_record("OK", 7)], "has the paths 7 and None"),
        ([realiad_record("HS", f"{NG}.jpg", {})], "has the paths .* and {}"),
        ([{"image_path": f"{NG}.jpg", "mask_path": None}], "has no 'anomaly_class'"),
        ([{"anomaly_class": "OK", "mask_path": None}], "has no 'image_path'"),
        (["OK"], "record 1 .* is no object"),
        ({"a": 1}, "no list 'test'"),
        ([], "no list 'test'"),
        ([realiad_record("HS", f"{NG}.jpg")], r"1 defective images of Real-IAD 'audiojack' have no mask: .*HS_C1"),
        ([realiad_record("HS", f"{NG}.jpg", "NG/gone.png")], "have no mask"),
        ([realiad_record("OK", "OK/gone.jpg")], r"1 test images of Real-IAD 'audiojack' are missing: .*gone\.jpg"),
    ],
)
def test_realiad_index_is_untrusted(tmp_path, test, message):
    root = make_realiad(tmp_path)
    write_realiad_index(root, "audiojack", [GOOD_RECORD], test)
    with pytest.raises(UserError, match=message):
        LAYOUTS["Real-IAD"].test(root, "audiojack", ListingOptions())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "index not found: .*audiojack.json' does not exist"),
        (b"<html>", "is no JSON"),
        (b'{"test": [', "is no JSON"),
        (b"[" * 100_000, "is no JSON"),
        (b"\xff\xfe\x00", "unreadable"),
        (b"[1]", "no list 'test'"),
        (b'{"train": []}', "no list 'test'"),
    ],
)
def test_realiad_index_must_be_one(tmp_path, content, message):
    root = make_realiad(tmp_path)
    path = root / "realiad_jsons" / "realiad_jsons" / "audiojack.json"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        LAYOUTS["Real-IAD"].test(root, "audiojack", ListingOptions())


def test_damaged_index_ends_the_command_with_code_2(tmp_path, train, capsys):
    root = make_realiad(tmp_path / "data")
    write_realiad_index(root, "audiojack", [realiad_record("OK", "../../secret.jpg")], [GOOD_RECORD])
    assert train("--item", "audiojack", dataset="Real-IAD", data=root) == 2
    assert "error: path refused: record 1 of 'train'" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_enormous_index_is_not_read(tmp_path):
    root = make_realiad(tmp_path)
    with (root / "realiad_jsons" / "realiad_jsons" / "audiojack.json").open("r+b") as file:
        file.truncate(300_000_000)  # a hole: nothing is written
    with pytest.raises(UserError, match="300000000 bytes, the limit is 200000000"):
        LAYOUTS["Real-IAD"].train(root, "audiojack", ListingOptions())


@pytest.mark.parametrize(
    ("dataset", "make", "item", "mask"),
    [
        ("VisA", make_visa, "candle", "1cls/candle/ground_truth/bad/002.png"),
        ("VisA", make_visa_downloaded, "candle", "candle/Data/Masks/Anomaly/002.png"),
        ("Real-IAD", make_realiad, "audiojack", f"realiad_1024/audiojack/{NG}.png"),
        ("MVTec-LOCO", make_loco, "breakfast_box", "breakfast_box/ground_truth/logical_anomalies/000"),
        ("BTAD", make_btad, "03", "03/ground_truth/ko/0001.BMP"),
    ],
)
def test_masks_may_be_missing_on_demand_only(tmp_path, dataset, make, item, mask):
    root = make(tmp_path)
    path = root / mask
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    with pytest.raises(UserError, match=r"1 defective .*--allow_missing_masks"):
        listed(dataset, root, item)
    test = listed(dataset, root, item, allow_missing_masks=True)[1]
    assert sum(not record.has_pixel_truth for record in test) == 1
    assert len(test) == GOOD + DEFECTIVE


def test_every_fault_is_told_to_those_who_ask(tmp_path):
    root = make_btad(tmp_path)
    folder = root / "03"
    for index in range(12):
        save(folder / "ground_truth" / "ko" / f"extra{index:02d}.png", np.ones((SIDE, SIDE), np.uint8))
    (folder / "ground_truth" / "ko" / "0001.BMP").unlink()
    faults = []
    test = LAYOUTS["BTAD"].test(root, "03", ListingOptions(on_fault=faults.append))
    assert len(test) == GOOD + DEFECTIVE
    assert "12 files" in faults[0]
    assert "'extra09.png' ..." in faults[0]
    assert "extra10" not in faults[0]
    assert "1 defective images" in faults[1]
    assert "'0001.png'" in faults[1]
    assert len(faults) == 2
