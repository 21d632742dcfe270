"""Stopping and going on: signals, kill -9, bit-identical weights, finished categories."""

import json
import os
import signal
import time

import pytest
import torch

import utils.training
from common.errors import Interrupted
from tests.conftest import command_line, run_folder
from tests.miniature import make_mvtec
from utils.checkpoint import load_checkpoint, save_checkpoint

ITERATIONS = "11"  # 8 images in batches of 4: the run stops in the middle of an epoch


@pytest.fixture
def data(tmp_path):
    return make_mvtec(tmp_path / "data", train=10)


@pytest.fixture
def uninterrupted(train, data, tmp_path):
    """Weights of a run that nothing stopped."""
    assert train("--total_iters", ITERATIONS, "--save_name", "whole", data=data) == 0
    return load_checkpoint(run_folder(tmp_path, "whole") / "bottle" / "model.pth")["model"]


def weights(tmp_path, save_name: str) -> dict[str, torch.Tensor]:
    return load_checkpoint(run_folder(tmp_path, save_name) / "bottle" / "model.pth")["model"]


def assert_same(first: dict, second: dict) -> None:
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different


def stop_after(monkeypatch, iterations: int) -> None:
    """Let a SIGINT arrive while iteration number `iterations` is computed."""
    steps = iter(range(1, 1000))
    original = utils.training._backward

    def backward(*arguments):
        if next(steps) == iterations:
            os.kill(os.getpid(), signal.SIGINT)
        return original(*arguments)

    monkeypatch.setattr(utils.training, "_backward", backward)


@pytest.mark.parametrize("workers", ["0", "2"])
def test_resumed_training_is_bit_identical(train, data, tmp_path, uninterrupted, monkeypatch, workers):
    flags = ("--total_iters", ITERATIONS, "--save_name", "stopped", "--num_workers", workers, "--cache_features", "ram")
    with monkeypatch.context() as patch:
        stop_after(patch, 6)
        assert train(*flags, data=data) == 130
    folder = run_folder(tmp_path, "stopped")
    assert load_checkpoint(folder / "bottle" / "last.pth")["iteration"] == 6
    assert not (folder / "bottle" / "model.pth").exists()
    assert train(*flags, data=data) == 2
    assert train(*flags, "--resume", data=data) == 0
    assert_same(weights(tmp_path, "stopped"), uninterrupted)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines if line["kind"] == "training"] == [10, 11]


def test_resume_without_feature_cache_and_with_workers_is_bit_identical(train, data, tmp_path, monkeypatch):
    flags = ("--total_iters", ITERATIONS, "--cache_features", "off")
    assert train(*flags, "--save_name", "whole-images", data=data) == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 7)
        assert train(*flags, "--save_name", "stopped", "--num_workers", "2", data=data) == 130
    assert train(*flags, "--save_name", "stopped", "--num_workers", "2", "--resume", data=data) == 0
    assert_same(weights(tmp_path, "stopped"), weights(tmp_path, "whole-images"))


def test_equal_seeds_give_equal_files_and_other_seeds_other_ones(train, data, tmp_path, uninterrupted):
    for name, seed in (("again", "1"), ("other", "2")):
        assert train("--total_iters", ITERATIONS, "--save_name", name, "--seed", seed, data=data) == 0
    assert_same(weights(tmp_path, "again"), uninterrupted)
    first, second = (run_folder(tmp_path, name) for name in ("whole", "again"))
    for file in ("results.csv", "bottle/scores.csv", "bottle/maps/contact_sheet.jpg"):
        assert (first / file).read_bytes() == (second / file).read_bytes()
    assert not torch.equal(weights(tmp_path, "other")["prototype_token"], uninterrupted["prototype_token"])


def test_stage_2_resumes_with_its_thresholds_and_moments(train, data, tmp_path, uninterrupted, monkeypatch):
    flags = ("--clb_stage", "2", "--load_checkpoint", "whole", "--total_iters", "8")
    assert train(*flags, "--save_name", "two", data=data) == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        assert train(*flags, "--save_name", "two-stopped", data=data) == 130
    assert train(*flags, "--save_name", "two-stopped", "--resume", data=data) == 0
    assert_same(weights(tmp_path, "two"), weights(tmp_path, "two-stopped"))


def test_other_flags_do_not_resume(train, data, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        assert train("--total_iters", ITERATIONS, data=data) == 130
    before = (run_folder(tmp_path) / "bottle" / "last.pth").read_bytes()
    assert train("--total_iters", "20", "--resume", data=data) == 2
    assert "total_iters 11 there, 20 here" in capsys.readouterr().err
    assert (run_folder(tmp_path) / "bottle" / "last.pth").read_bytes() == before


def test_a_training_that_an_earlier_version_began_is_resumed(train, data, tmp_path, uninterrupted, monkeypatch):
    """Its files do not name flags that are newer."""
    flags = ("--total_iters", ITERATIONS, "--save_name", "stopped")
    with monkeypatch.context() as patch:
        stop_after(patch, 6)
        assert train(*flags, data=data) == 130
    path = run_folder(tmp_path, "stopped") / "bottle" / "last.pth"
    content = load_checkpoint(path)
    for name in ("host", "adam_eps"):
        del content["config"][name]
    save_checkpoint(path, {name: value for name, value in content.items() if name != "model_sha256"})
    assert train(*flags, "--resume", data=data) == 0
    assert_same(weights(tmp_path, "stopped"), uninterrupted)


def test_finished_categories_are_skipped(train, tmp_path):
    data = make_mvtec(tmp_path / "data", items=("bottle", "nut"))
    assert train("--item", "bottle", "--total_iters", "4", data=data) == 0
    model = run_folder(tmp_path) / "bottle" / "model.pth"
    before = model.stat().st_mtime_ns
    assert train("--total_iters", "4", "--resume", data=data) == 0
    assert model.stat().st_mtime_ns == before
    rows = (run_folder(tmp_path) / "results.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["item", "bottle", "nut", "Mean"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_signals_to_a_real_process(commands, train, data, tmp_path, number):
    flags = ("--total_iters", "4000", "--save_every", "20", "--save_name", "real")
    process = commands.start("Binary_INP_Single_Class.py", *command_line(tmp_path, data, "Folder", *flags))
    last = run_folder(tmp_path, "real") / "bottle" / "last.pth"
    deadline = time.monotonic() + 60
    while not last.exists() and not process.has_ended(0.05) and time.monotonic() < deadline:
        pass
    assert last.exists(), process.err_so_far()
    process.send(number)
    finished = process.wait()
    assert finished.code == (-number if number == signal.SIGKILL else 128 + number), finished.err
    assert load_checkpoint(last)["iteration"] >= 20
    if number != signal.SIGKILL:
        assert "--resume" in finished.err


def terminate_twice(stop: utils.training.StopRequest) -> None:
    with stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal_number == signal.SIGTERM
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)


def test_a_second_signal_ends_at_once():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted):
        terminate_twice(utils.training.StopRequest())
    assert signal.getsignal(signal.SIGTERM) == before
