"""What a check of a data set finds, and that it finds all of it at once."""

import json
import shutil

import numpy as np

from datasets import published
from datasets.check import record_faults, shared_images, undecodable
from datasets.images import DEFAULT_MAX_PIXELS, list_images
from datasets.records import Record
from scripts import check_dataset
from tests.miniature import make_mvtec, save
from tests.miniature_layouts import (
    DEFECTIVE,
    GOOD,
    TRAIN,
    each_tree,
    make_btad,
    make_loco,
    make_mpdd,
    make_realiad,
    make_visa,
    make_visa_downloaded,
)


def checked(capsys, dataset, *roots, item=None, flags=()) -> tuple[int, str]:
    items = ["--item", item] if item else []
    code = check_dataset.main(["--dataset", dataset, "--data_path", *map(str, roots), *items, *flags])
    return code, capsys.readouterr().out


def test_copies_and_undecodable_files_are_found(tmp_path):
    root = make_mvtec(tmp_path)
    train, test = (list_images(root / "bottle" / part) for part in ("train/good", "test/good"))
    test[1].write_bytes(train[2].read_bytes())
    test[2].write_bytes(b"")
    as_records = [[Record(path, 0, "bottle") for path in paths] for paths in (train, test)]
    assert shared_images(*as_records) == [(train[2], test[1])]
    ((record, reason),) = undecodable([*as_records[0], *as_records[1]], DEFAULT_MAX_PIXELS)
    assert record.path == test[2]
    assert "0 bytes" in reason


def test_faults_of_one_record(tmp_path):
    ramp = np.tile(np.arange(0, 256, 4, dtype=np.uint8), (48, 1))
    image = save(tmp_path / "a.png", ramp)
    empty, full = save(tmp_path / "empty.png", ramp * 0), save(tmp_path / "full.png", ramp)
    small, broken = save(tmp_path / "small.png", ramp[:9] + 1), tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    for masks in ((empty, full), (full, empty)):
        assert record_faults(Record(image, 1, "part", masks)) == ([], [])
    errors, warnings = record_faults(Record(image, 1, "part", (empty,)))
    assert not errors
    assert "empty mask" in warnings[0]
    errors, warnings = record_faults(Record(broken, 1, "part", (broken, small)))
    assert [error.startswith(f"cannot read {str(broken)!r}") for error in errors] == [True, True]
    assert not warnings
    (error,), warnings = record_faults(Record(image, 1, "part", (small,)))
    assert "64x9" in error
    assert "64x48" in error
    assert not warnings


@each_tree
def test_every_tree_is_free_of_errors(tmp_path, capsys, dataset, make, item, kinds):
    code, printed = checked(capsys, dataset, make(tmp_path), item=item)
    assert code == 0, printed
    row = printed.splitlines()[1].split()
    assert row[:4] == [item, str(TRAIN), str(GOOD), str(DEFECTIVE)]
    assert row[4:6] == (["2", "15"] if dataset == "MVTec-LOCO" else ["-", "13"])
    assert row[-2] == "0"
    assert "error:" not in printed
    known = {"VisA", "MVTec-LOCO", "BTAD", "MPDD"}
    assert ("counts differ" in printed) == (dataset in known)


def test_published_counts_stand_beside_ours(tmp_path, capsys):
    root = make_mvtec(tmp_path)
    code, printed = checked(capsys, "MVTec-AD", root, item="bottle")
    assert code == 0
    assert "209/20/63" in printed
    assert "warning: bottle: counts differ from the published ones (209, 20, 63)" in printed
    (root / "bottle" / "test" / "good" / "001.png").write_bytes(b"")
    code, printed = checked(capsys, "MVTec-AD", root, item="bottle")
    assert code == 2
    assert "error: bottle: cannot read" in printed


def test_totals_of_all_categories(tmp_path, capsys):
    root = make_btad(tmp_path / "btad", items=("01", "02", "03"))
    loco = make_loco(tmp_path / "loco")
    code, printed = checked(capsys, "BTAD+MVTec-LOCO", root, loco, flags=("--item", "01", "02", "03", "breakfast_box"))
    lines = {line.split()[0]: line.split() for line in printed.splitlines()}
    assert code == 0
    assert lines["BTAD"][1:7] == ["(total)", "18", "9", "12", "-", "39"]
    assert lines["BTAD"][7] == "1799/451/290"
    assert lines["BTAD/02"][6] == "399/30/200"
    assert lines["MVTec-LOCO/breakfast_box"][1:7] == ["6", "3", "4", "2", "15", "351/102/173/62"]
    assert "MVTec-LOCO (total)" not in printed
    assert "total" not in checked(capsys, "BTAD", root, flags=("--item", "01", "02"))[1]


def test_total_of_another_split_is_not_compared(tmp_path, capsys):
    root = make_realiad(tmp_path, items=published.REAL_IAD)
    shutil.copytree(root / "realiad_jsons", root / "realiad_jsons_sv")
    (root / "realiad_jsons_sv" / "realiad_jsons").rename(root / "realiad_jsons_sv" / "realiad_jsons_sv")
    code, printed = checked(capsys, "Real-IAD", root)
    assert code == 0
    total = next(line.split() for line in printed.splitlines() if line.startswith("Real-IAD (total)"))
    assert total[2:] == ["180", "90", "120", "-", "390", "36465/63256/51329", "0", "1"]
    assert "warning: Real-IAD (total): counts differ" in printed
    code, printed = checked(capsys, "Real-IAD", root, flags=("--realiad_json", "realiad_jsons_sv"))
    assert code == 0
    assert "36465" not in printed
    assert "counts differ" not in printed


def test_all_faults_of_a_category_at_once(tmp_path, capsys):
    root = make_mpdd(tmp_path)
    folder = root / "bracket_black"
    bad = sorted((folder / "test" / "hole").iterdir()) + sorted((folder / "test" / "scratches").iterdir())
    truth = sorted((folder / "ground_truth" / "hole").iterdir()) + sorted((folder / "ground_truth" / "scratches").iterdir())
    truth[0].unlink()
    save(truth[1], np.zeros((64, 64), np.uint8))
    save(truth[2], np.ones((64, 65), np.uint8))
    save(folder / "ground_truth" / "scratches" / "surplus_mask.png", np.ones((64, 64), np.uint8))
    save(folder / "ground_truth" / "good" / "000.png", np.ones((64, 64), np.uint8))
    (folder / "train" / "good" / "000.png").write_bytes(b"")
    (folder / "test" / "good" / "000.png").write_bytes((folder / "train" / "good" / "002.png").read_bytes())
    bad[3].write_bytes(bad[3].read_bytes()[:2000])
    code, printed = checked(capsys, "MPDD", root, item="bracket_black")
    errors = [line for line in printed.splitlines() if line.startswith("error: bracket_black: ")]
    warnings = [line for line in printed.splitlines() if line.startswith("warning: bracket_black: ")]
    assert code == 2
    for part, line in zip(("no mask", "without an image", "0 bytes", "mask size differs", "cut short"), errors, strict=True):
        assert part in line
    assert repr(bad[0].name) in errors[0]
    for part, line in zip(("empty mask", "in train and test", "belong to no", "counts"), warnings, strict=True):
        assert part in line
    assert str(folder / "ground_truth" / "good") in warnings[2]
    assert printed.splitlines()[1].split()[-2:] == ["5", "4"]


def test_what_ends_a_listing_is_told_once_and_the_rest_checked(tmp_path, capsys):
    root = make_realiad(tmp_path / "a")
    (root / "realiad_jsons" / "realiad_jsons" / "audiojack.json").write_text("<html>")
    code, printed = checked(capsys, "Real-IAD", root, item="audiojack")
    assert code == 2
    assert printed.count("is no JSON") == 1
    root = make_mvtec(tmp_path / "b")
    shutil.rmtree(root / "bottle" / "train")
    (root / "bottle" / "test" / "hole" / "000.png").write_bytes(b"")
    code, printed = checked(capsys, "MVTec-AD", root, item="bottle")
    assert code == 2
    assert "no training images" in printed
    assert "0 bytes" in printed


def test_missing_and_stray_files_of_listed_data_sets(tmp_path, capsys):
    visa = make_visa_downloaded(tmp_path / "visa")
    (visa / "candle" / "Data" / "Images" / "Normal" / "003.JPG").unlink()
    (visa / "candle" / "Data" / "Images" / "Anomaly" / "001.JPG").unlink()
    (visa / "candle" / "Data" / "Masks" / "Anomaly" / "002.png").unlink()
    save(visa / "candle" / "Data" / "Masks" / "Anomaly" / "extra.png", np.ones((64, 64), np.uint8))
    code, printed = checked(capsys, "VisA", visa, item="candle")
    assert code == 2
    assert "2 VisA images of 'candle' are missing" in printed
    assert "1 defective VisA images of 'candle' have no mask" in printed
    assert "1 masks or folders of masks belong to no defective image" in printed
    assert "extra.png" in printed

    realiad = make_realiad(tmp_path / "realiad")
    folder = realiad / "realiad_1024" / "audiojack" / "NG" / "HS" / "S0000"
    save(folder / "other.png", np.ones((64, 64), np.uint8))
    code, printed = checked(capsys, "Real-IAD", realiad, item="audiojack")
    assert code == 0
    assert f"belong to no defective image: {str(folder / 'other.png')!r}\n" in printed


def test_loco_saturation_is_checked(tmp_path, capsys):
    root = make_loco(tmp_path)
    path = root / "breakfast_box" / "defects_config.json"
    path.write_text(json.dumps(json.loads(path.read_text())[:1]))
    (root / "breakfast_box" / "validation" / "good" / "000.png").write_bytes(b"")
    code, printed = checked(capsys, "MVTec-LOCO", root, item="breakfast_box")
    assert code == 2
    assert printed.count("unknown defect: ") == 2
    assert "pixel value 254" in printed
    assert "0 bytes" in printed
    path.unlink()
    code, printed = checked(capsys, "MVTec-LOCO", root, item="breakfast_box")
    assert code == 2
    assert printed.count("saturation of defects not found") == 1


def test_missing_masks_may_be_allowed(tmp_path, capsys):
    root = make_visa(tmp_path)
    (root / "1cls" / "candle" / "ground_truth" / "bad" / "000.png").unlink()
    assert checked(capsys, "VisA", root, item="candle")[0] == 2
    assert checked(capsys, "VisA", root, item="candle", flags=("--allow_missing_masks",))[0] == 0
