"""One model for all categories of one or several data sets, and its test on data it never saw."""

import csv
import json

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

import scripts.export
from binarize.packed import read_file
from datasets.records import ImageDataset, Record
from models.build import RANDOM_TINY_ENCODER, build_encoder
from tests.conftest import run_folder
from tests.miniature import make_mvtec
from utils.checkpoint import load_checkpoint
from utils.detectors import restore_detector
from utils.hosts import INP_FORMER
from utils.protocol import EvaluationOptions, image_score, smoothed_map

NAME = "INP-Former-Multi-Class"
ITEMS = ("bottle", "nut")
ITERATIONS = ("--total_iters", "4")


@pytest.fixture
def data(tmp_path):
    return make_mvtec(tmp_path / "data", items=ITEMS)


def rows(folder) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "results.csv").open()))


def scores(folder, item: str) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / item / "scores.csv").open()))


def weights(path) -> dict[str, torch.Tensor]:
    return load_checkpoint(path)["model"]


def assert_same(first: dict, second: dict) -> None:
    assert first.keys() == second.keys()
    assert not [name for name in first if not torch.equal(first[name], second[name])]


def test_one_model_and_a_row_per_category(train_multi, tmp_path, data):
    assert train_multi("--clb_stage", "0", "--total_epochs", "2", data=data) == 0
    folder = run_folder(tmp_path, f"{NAME}-FP")
    assert sorted(path.name for path in folder.rglob("*.pth")) == ["model.pth"]
    content = load_checkpoint(folder / "model.pth")
    assert (content["item"], content["items"], content["stage"]) == ("multi", list(ITEMS), 0)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines if line["kind"] == "training"] == [2 * (8 + 8) // 4]
    found = rows(folder)
    assert [row["item"] for row in found] == [*ITEMS, "Mean"]
    for row in found[:-1]:
        judged = scores(folder, row["item"])
        truth = roc_auc_score([int(line["label"]) for line in judged], [float(line["score"]) for line in judged])
        assert float(row["I-AUROC"]) == pytest.approx(truth, abs=1e-4)
        assert (folder / row["item"] / "maps" / "contact_sheet.jpg").is_file()


def test_one_category_gives_the_single_class_model(train, train_multi, tmp_path, data):
    flags = (*ITERATIONS, "--clb_stage", "1", "--item", "nut")
    assert train(*flags, data=data) == 0
    assert train_multi(*flags, data=data) == 0
    single, multi = run_folder(tmp_path) / "nut", run_folder(tmp_path, NAME)
    assert_same(weights(single / "model.pth"), weights(multi / "model.pth"))
    assert (single / "scores.csv").read_bytes() == (multi / "nut" / "scores.csv").read_bytes()


def test_stages_by_name_and_by_file(train_multi, tmp_path, data):
    assert train_multi(*ITERATIONS, "--clb_stage", "0", data=data) == 0
    assert train_multi(*ITERATIONS, "--clb_stage", "1", "--load_checkpoint", f"{NAME}-FP", data=data) == 0
    stage_1 = str(run_folder(tmp_path, NAME) / "model.pth")
    assert train_multi(*ITERATIONS, "--clb_stage", "2", "--load_checkpoint", stage_1, data=data) == 0
    assert train_multi(*ITERATIONS, "--clb_stage", "2", "--load_checkpoint", NAME, "--save_name", "named", data=data) == 0
    folder = run_folder(tmp_path, f"{NAME}-CLB2")
    assert_same(weights(folder / "model.pth"), weights(run_folder(tmp_path, "named") / "model.pth"))
    kept = {path: path.read_bytes() for path in folder.rglob("*.csv")}
    assert train_multi("--clb_stage", "2", "--phase", "test", data=data) == 0
    assert {path: path.read_bytes() for path in kept} == kept


def test_stage_2_of_other_categories_is_refused(train_multi, tmp_path, data, capsys):
    assert train_multi(*ITERATIONS, "--item", "nut", data=data) == 0
    assert train_multi(*ITERATIONS, "--clb_stage", "2", "--load_checkpoint", NAME, data=data) == 2
    assert "items: expected ['bottle', 'nut'], found ['nut']" in capsys.readouterr().err


def test_other_categories_do_not_mix_into_a_run(train_multi, tmp_path, data, capsys):
    assert train_multi(*ITERATIONS, "--item", "nut", data=data) == 0
    assert train_multi(*ITERATIONS, "--resume", data=data) == 2
    assert "item ['nut'] there, None here" in capsys.readouterr().err


def test_resume_evaluates_only_what_is_missing(train_multi, tmp_path, data):
    assert train_multi(*ITERATIONS, data=data) == 0
    folder = run_folder(tmp_path, NAME)
    complete = (folder / "results.csv").read_bytes()
    table = complete.decode().splitlines(keepends=True)
    (folder / "results.csv").write_text(table[0] + table[1])
    untouched = (folder / "bottle" / "scores.csv").stat().st_mtime_ns
    (folder / "nut" / "scores.csv").unlink()
    assert train_multi(*ITERATIONS, "--resume", data=data) == 0
    assert (folder / "results.csv").read_bytes() == complete
    assert (folder / "bottle" / "scores.csv").stat().st_mtime_ns == untouched
    assert (folder / "nut" / "scores.csv").is_file()


def test_a_category_that_fails_leaves_the_others_complete(train, tmp_path, data, capsys):
    broken = data / "bottle" / "train" / "good" / "000.png"
    whole = broken.read_bytes()
    broken.write_bytes(b"")
    assert train(*ITERATIONS, data=data) == 1
    output = capsys.readouterr()
    folder = run_folder(tmp_path)
    assert [row["item"] for row in rows(folder)] == ["nut", "Mean"]
    assert "failed: bottle: " in output.out
    (failure,) = csv.DictReader((folder / "failures.csv").open())
    assert failure["item"] == "bottle"
    assert "000.png" in failure["reason"]
    trained = (folder / "nut" / "model.pth").stat().st_mtime_ns

    broken.write_bytes(whole)
    assert train(*ITERATIONS, "--resume", data=data) == 0
    assert [row["item"] for row in rows(folder)] == [*ITEMS, "Mean"]
    assert (folder / "nut" / "model.pth").stat().st_mtime_ns == trained
    assert not (folder / "failures.csv").exists()


def test_one_model_evaluates_the_other_categories_when_one_fails(train_multi, tmp_path, data):
    broken = data / "nut" / "test" / "good" / "000.png"
    whole = broken.read_bytes()
    broken.write_bytes(whole[: len(whole) // 2])
    assert train_multi(*ITERATIONS, "--cache_features", "off", data=data) == 1
    assert [row["item"] for row in rows(run_folder(tmp_path, NAME))] == ["bottle", "Mean"]
    broken.write_bytes(whole)
    assert train_multi(*ITERATIONS, "--cache_features", "off", "--resume", data=data) == 0
    assert [row["item"] for row in rows(run_folder(tmp_path, NAME))] == [*ITEMS, "Mean"]


def test_several_data_sets_in_one_model(train_multi, tmp_path, data, capsys):
    other = make_mvtec(tmp_path / "other", items=("tubes",), good=4)
    paths = ("--data_path", str(data), str(other))
    flags = (*ITERATIONS, "--item", "nut", "MPDD/tubes")
    assert train_multi(*flags, *paths, dataset="Folder+MPDD") == 0
    folder = run_folder(tmp_path, "INP-Former-Super-Multi-Class", dataset=None)
    found = rows(folder)
    assert [row["item"] for row in found] == ["Folder/nut", "MPDD/tubes", "Mean Folder", "Mean MPDD", "Mean"]
    assert found[2]["AUPRO"] == found[0]["AUPRO"]
    assert len(scores(folder, "MPDD/tubes")) == 7
    assert load_checkpoint(folder / "model.pth")["items"] == ["Folder/nut", "MPDD/tubes"]
    assert "Mean MPDD" in capsys.readouterr().out


def test_zero_shot_scores_by_the_nearest_prototype(train_multi, tmp_path, data):
    assert train_multi(*ITERATIONS, "--item", "bottle", data=data) == 0
    model = run_folder(tmp_path, NAME) / "model.pth"
    target = make_mvtec(tmp_path / "target", items=("tubes",))
    flags = ("--phase", "test", "--scoring", "prototype", "--test_checkpoint", str(model), "--item", "tubes")
    assert train_multi(*flags, data=target, dataset="MPDD") == 0
    folder = run_folder(tmp_path, "INP-Former-Zero-Shot", dataset=None)
    folder = folder.with_name(f"{folder.name}_Source=Folder_Target=MPDD")
    found = scores(folder, "tubes")
    assert len(found) == 6

    encoder = build_encoder(RANDOM_TINY_ENCODER, 56)
    detector = restore_detector(load_checkpoint(model), model, encoder, INP_FORMER).eval()
    images = ImageDataset([Record(target / line["path"], 0, "") for line in found], 64, 56)
    features = detector.encode(torch.stack([images.image(index) for index in range(6)])).mean(dim=1)
    prototypes = detector.prototypes(features)
    cosine = torch.nn.functional.cosine_similarity(features.unsqueeze(2), prototypes.unsqueeze(1), dim=-1)
    maps = torch.nn.functional.interpolate(
        (1 - cosine).amin(dim=2).reshape(6, 1, 4, 4), size=(56, 56), mode="bilinear", align_corners=True
    ).squeeze(1)
    options = EvaluationOptions()
    expected = image_score(smoothed_map(maps, options), options.max_ratio).detach().numpy()
    # the command's features come from the cache, in float16
    np.testing.assert_allclose([float(line["score"]) for line in found], expected, rtol=2e-3)


def test_prototype_scoring_of_the_runs_own_model_has_its_own_folder(train_multi, tmp_path, data):
    assert train_multi(*ITERATIONS, data=data) == 0
    folder = run_folder(tmp_path, NAME)
    trained = (folder / "results.csv").read_bytes()
    assert train_multi("--phase", "test", "--scoring", "prototype", data=data) == 0
    assert (folder / "results.csv").read_bytes() == trained
    assert (folder / "test_scoring=prototype" / "results.csv").read_bytes() != trained


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--scoring", "prototype"), "--phase test"),
        (("--test_checkpoint", "model.pth"), "--phase test"),
        (("--phase", "test", "--test_checkpoint", "absent.pth"), "absent.pth"),
        (("--dataset", "Folder+MPDD"), "needs 2 folders"),
        (("--dataset", "Folder+Folder"), "twice"),
    ],
)
def test_flags_that_cannot_work(train_multi, data, capsys, flags, expected):
    assert train_multi(*ITERATIONS, *flags, data=data) == 2
    assert expected in capsys.readouterr().err


def test_packed_model_of_many_categories_can_be_meant_for_one(train_multi, tmp_path, data, capsys):
    assert train_multi(*ITERATIONS, data=data) == 0
    checkpoint = run_folder(tmp_path, NAME) / "model.pth"
    content = load_checkpoint(checkpoint)
    thresholds = {}
    for item in (None, *ITEMS):
        output = tmp_path / f"{item}.binaryad"
        flags = ("--checkpoint", str(checkpoint), "--output", str(output), *(("--item", item) if item else ()))
        assert scripts.export.main(flags) == 0
        description = read_file(output)[1]
        assert description["item"] == (item or "multi")
        thresholds[item] = description["decision"]["threshold"]
    for item in ITEMS:
        assert thresholds[item] == pytest.approx(np.quantile(content["calibrations"][item]["scores"], 0.99))
    assert len(content["calibration"]["scores"]) == 16
    assert thresholds["bottle"] != thresholds["nut"]
    assert scripts.export.main((*flags, "--item", "tubes")) == 2
    assert "was trained on bottle nut" in capsys.readouterr().err


def zero_shot_folder(tmp_path, target: str, gate: str = ""):
    folder = run_folder(tmp_path, "INP-Former-Zero-Shot", dataset=None)
    return folder.with_name(f"{folder.name}_Source=Folder_Target={target}{gate}")


def test_zero_shot_results_of_another_model_gate_or_folder_do_not_mix(train_multi, tmp_path, data, capsys):
    model = run_folder(tmp_path, NAME) / "model.pth"
    test = ("--phase", "test", "--scoring", "prototype", "--test_checkpoint", str(model))
    assert train_multi(*ITERATIONS, data=data) == 0
    assert train_multi(*test, data=data) == 0
    kept = (zero_shot_folder(tmp_path, "Folder") / "results.csv").read_bytes()
    assert train_multi(*test, "--force_gate", "0", data=data) == 0
    assert (zero_shot_folder(tmp_path, "Folder", "_gate=0") / "results.csv").is_file()
    other = make_mvtec(tmp_path / "other", items=("tubes",))
    assert train_multi(*test, data=other) == 2
    assert "data_path" in capsys.readouterr().err
    assert train_multi(*ITERATIONS, "--overwrite", "--seed", "2", data=data) == 0
    assert train_multi(*test, data=data) == 2
    assert "model of sha256" in capsys.readouterr().err
    assert (zero_shot_folder(tmp_path, "Folder") / "results.csv").read_bytes() == kept
    assert train_multi(*test, "--overwrite", data=data) == 0
    assert (zero_shot_folder(tmp_path, "Folder") / "results.csv").read_bytes() != kept


def test_categories_of_another_folder_do_not_mix_into_a_run(train, tmp_path, data, capsys):
    assert train(*ITERATIONS, "--item", "nut", data=data) == 0
    other = make_mvtec(tmp_path / "other", items=("tubes",))
    assert train(*ITERATIONS, data=other) == 2
    assert "data_path" in capsys.readouterr().err
    (tmp_path / "link").symlink_to(data)
    assert train(*ITERATIONS, "--item", "bottle", data=tmp_path / "link") == 0
    assert [row["item"] for row in rows(run_folder(tmp_path))] == [*ITEMS, "Mean"]


def test_processes_are_part_of_a_run(train, tmp_path, data, capsys):
    assert train(*ITERATIONS, "--item", "nut", data=data) == 0
    path = run_folder(tmp_path) / "env.json"
    content = json.loads(path.read_text())
    assert content["processes"] == 1
    path.write_text(json.dumps({**content, "processes": 4}))
    assert train(*ITERATIONS, "--item", "bottle", data=data) == 2
    assert "processes 4 there, 1 here" in capsys.readouterr().err


def test_damaged_environment_is_named(train, tmp_path, data, capsys):
    assert train(*ITERATIONS, "--item", "nut", data=data) == 0
    (run_folder(tmp_path) / "env.json").write_text('{"items": ["nu')
    assert train(*ITERATIONS, "--item", "bottle", data=data) == 2
    assert "env.json" in capsys.readouterr().err


def test_overwriting_forgets_every_test_of_the_old_model(train, tmp_path, data):
    assert train(*ITERATIONS, data=data) == 0
    assert train("--phase", "test", "--mask_threshold", "0", data=data) == 0
    measured = run_folder(tmp_path) / "test_mask_threshold=0.0"
    assert [row["item"] for row in rows(measured)] == [*ITEMS, "Mean"]
    assert train(*ITERATIONS, "--overwrite", "--item", "nut", data=data) == 0
    assert [row["item"] for row in rows(measured)] == ["bottle", "Mean"]
    assert not (measured / "nut").exists()


def test_pixel_metrics_from_bins_are_marked_until_they_are_exact(train, tmp_path, data):
    assert train(*ITERATIONS, "--metrics_memory", "0.001", data=data) == 0
    path = run_folder(tmp_path) / "pixel_errors.csv"
    errors = {row["item"]: float(row["error"]) for row in csv.DictReader(path.open())}
    assert errors.keys() == set(ITEMS)
    binned = {row["item"]: row for row in rows(run_folder(tmp_path))}
    assert train("--phase", "test", "--metrics_memory", "1", "--item", "nut", data=data) == 0
    exact = {row["item"]: row for row in rows(run_folder(tmp_path))}
    for metric in ("P-AUROC", "P-AP", "P-F1", "AUPRO"):
        assert abs(float(binned["nut"][metric]) - float(exact["nut"][metric])) <= errors["nut"] + 1e-4
    assert [row["item"] for row in csv.DictReader(path.open())] == ["bottle"]


def test_a_category_without_stage_1_does_not_keep_the_others_from_stage_2(train, tmp_path, data, capsys):
    assert train(*ITERATIONS, "--item", "nut", data=data) == 0
    stage_2 = (*ITERATIONS, "--clb_stage", "2", "--load_checkpoint", "INP-Former-Single-Class")
    assert train(*stage_2, data=data) == 1
    folder = run_folder(tmp_path, "INP-Former-Single-Class-CLB2")
    assert [row["item"] for row in rows(folder)] == ["nut", "Mean"]
    (failure,) = csv.DictReader((folder / "failures.csv").open())
    assert failure["item"] == "bottle"
    assert "no model for 'INP-Former-Single-Class'" in failure["reason"]
    assert train(*stage_2, "--item", "bottle", data=data) == 2
