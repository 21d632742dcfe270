"""Training from a few images: which ones, how many variants, one model or one per category."""

import csv
import json

import pytest
import torch

from tests.conftest import run_folder
from tests.miniature import make_mvtec
from utils.checkpoint import load_checkpoint

NAME = "INP-Former-Few-Shot"
ITEMS = ("bottle", "nut")
ITERATIONS = ("--total_iters", "4")


@pytest.fixture
def data(tmp_path):
    return make_mvtec(tmp_path / "data", items=ITEMS)


def chosen(folder) -> list[tuple[str, str]]:
    return [(row["item"], row["path"]) for row in csv.DictReader((folder / "chosen_files.csv").open())]


def test_one_model_of_all_variants_of_the_chosen_images(train_few, tmp_path, data, capsys):
    assert train_few("--shot", "2", "--total_epochs", "1", "--clb_stage", "0", data=data) == 0
    folder = run_folder(tmp_path, f"{NAME}-FP-2")
    files = chosen(folder)
    assert [item for item, _ in files] == ["bottle", "bottle", "nut", "nut"]
    assert len(set(files)) == 4
    assert all((data / path).is_file() and path.startswith(f"{item}/train/good/") for item, path in files)
    content = load_checkpoint(folder / "model.pth")
    assert content["chosen_files"] == {item: [path for name, path in files if name == item] for item in ITEMS}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines if line["kind"] == "training"][-1] == 2 * 2 * 22 // 4
    assert [row["item"] for row in csv.DictReader((folder / "results.csv").open())] == [*ITEMS, "Mean"]
    log = capsys.readouterr().err
    assert all(f"{item}: trains on {path!r}" in log for item, path in files)


def test_same_command_gives_the_same_files(train_few, tmp_path, data):
    for name in ("first", "second"):
        assert train_few(*ITERATIONS, "--shot", "1", "--save_name", name, data=data) == 0
    first, second = (run_folder(tmp_path, f"{name}-1") for name in ("first", "second"))
    for name in ("model.pth", "results.csv", "chosen_files.csv", "bottle/scores.csv", "nut/maps/contact_sheet.jpg"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_stage_2_continues_with_the_same_images_only(train_few, tmp_path, data, capsys):
    assert train_few(*ITERATIONS, "--shot", "1", data=data) == 0
    stage_2 = (*ITERATIONS, "--shot", "1", "--clb_stage", "2", "--load_checkpoint", NAME)
    assert train_few(*stage_2, data=data) == 0
    assert chosen(run_folder(tmp_path, f"{NAME}-1")) == chosen(run_folder(tmp_path, f"{NAME}-CLB2-1"))
    assert train_few(*stage_2, "--seed", "5", "--save_name", "other", data=data) == 2
    assert "other few-shot images" in capsys.readouterr().err


def test_a_model_per_category(train_few, tmp_path, data):
    assert train_few(*ITERATIONS, "--shot", "1", "--per_category", data=data) == 0
    assert train_few(*ITERATIONS, "--shot", "1", data=data) == 0
    folder = run_folder(tmp_path, f"{NAME}-Per-Category-1")
    models = [load_checkpoint(folder / item / "model.pth") for item in ITEMS]
    assert not torch.equal(models[0]["model"]["prototype_token"], models[1]["model"]["prototype_token"])
    together = chosen(run_folder(tmp_path, f"{NAME}-1"))
    assert [pair for item in ITEMS for pair in chosen(folder / item)] == together


def test_variants_are_cached_apart_from_the_images(train, train_few, tmp_path, data):
    flags = ("--total_iters", "1", "--clb_stage", "0", "--cache_features", "disk")
    assert train(*flags, data=data) == 0
    assert train_few(*flags, "--shot", "1", data=data) == 0
    assert train_few(*flags, "--shot", "1", "--cache_features", "off", "--save_name", "uncached", data=data) == 0
    cached, uncached = (
        [json.loads(line) for line in (run_folder(tmp_path, f"{name}-1") / "metrics.jsonl").read_text().splitlines()]
        for name in (f"{NAME}-FP", "uncached")
    )
    assert cached[0]["loss"] == pytest.approx(uncached[0]["loss"], rel=1e-3)


@pytest.mark.parametrize(
    ("shot", "expected"), [("9", "bottle has 8 training images, fewer than --shot 9"), ("0", "at least 1")]
)
def test_too_many_or_no_shots(train_few, data, capsys, shot, expected):
    try:
        code = train_few(*ITERATIONS, "--shot", shot, data=data)
    except SystemExit as stop:  # argparse refuses the number itself
        code = stop.code
    assert code == 2
    assert expected in capsys.readouterr().err
