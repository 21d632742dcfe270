"""Every option of Dinomaly through training, stop, resume and test: the same noise, hence the same bits."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from tests.conftest import run_folder
from tests.miniature import make_mvtec
from tests.test_resume import assert_same, stop_after
from utils.checkpoint import load_checkpoint

ITERATIONS = 7  # 10 images in batches of 4: the run stops in the middle of an epoch
REFERENCE = "reference"
OPTIONS = {
    REFERENCE: {},
    "softmax": {"decoder_attention": "softmax"},
    "binary maps": {"decoder_attention": "softmax", "sab": "binary"},
    "one group": {"groups": 1},
    "no class token": {"remove_class_token": True},
    "recentred": {"recentre": True},
    "no dropout": {"bottleneck_dropout": 0.0},
    "mining": {"mining_final": 0.5, "mining_warmup": 3, "mining_factor": 0.0},
}


@pytest.fixture
def learn(train_dinomaly, tmp_path, monkeypatch) -> Callable[..., int]:
    """Train `dinomaly-NAME` with a log line for every iteration; returns the exit code."""
    monkeypatch.setattr("utils.settings._LOG_EVERY", 1)
    data = make_mvtec(tmp_path / "data", train=10, good=2, defective=2)

    def call(name: str, *flags: str) -> int:
        words = ("--total_iters", str(ITERATIONS), "--quiet", "--save_name", f"dinomaly-{name}", *flags)
        return train_dinomaly(*words, data=data)

    return call


@pytest.fixture
def folder(tmp_path) -> Callable[[str], Path]:
    return lambda name: run_folder(tmp_path, f"dinomaly-{name}")


def flags_of(options: dict[str, object]) -> list[str]:
    return [word for name, value in options.items() for word in ([f"--{name}"] if value is True else [f"--{name}", str(value)])]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(folder / "model.pth")["model"]


def losses(folder: Path) -> list[float]:
    lines = [line for line in map(json.loads, (folder / "metrics.jsonl").open()) if line["kind"] == "training"]
    assert [line["iteration"] for line in lines] == list(range(1, ITERATIONS + 1))
    return [line["loss"] for line in lines]


def stop_and_go_on(learn, monkeypatch, name: str, flags: list[str]) -> None:
    """Train with a SIGINT in the middle, then go on."""
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        assert learn(name, *flags) == 130
    assert learn(name, *flags, "--resume") == 0


@pytest.fixture(scope="module")
def final_losses() -> dict[str, float]:
    """Of the options that were tested so far."""
    return {}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_is_stored_resumes_bit_identically_and_is_tested(learn, folder, monkeypatch, final_losses, name):
    flags = flags_of(OPTIONS[name])
    assert learn("whole", *flags) == 0
    whole, stopped = folder("whole"), folder("stopped")
    config = yaml.safe_load((whole / "config.yaml").read_text())
    assert {option: config[option] for option in OPTIONS[name]} == OPTIONS[name]

    stop_and_go_on(learn, monkeypatch, "stopped", flags)
    assert_same(weights(stopped), weights(whole))
    assert losses(stopped) == losses(whole)
    assert losses(whole)[-1] not in final_losses.values(), final_losses  # the flag goes somewhere
    final_losses[name] = losses(whole)[-1]

    tables = [whole / "results.csv", whole / "bottle" / "scores.csv"]
    kept = [table.read_bytes() for table in tables]
    for table in tables:
        table.unlink()
    assert learn("whole", *flags, "--phase", "test") == 0
    assert [table.read_bytes() for table in tables] == kept


def test_stage_2_resumes_with_its_thresholds_and_noise(learn, folder, monkeypatch):
    assert learn("one") == 0
    stage_2 = ["--clb_stage", "2", "--load_checkpoint", "dinomaly-one"]
    assert learn("two", *stage_2) == 0
    stop_and_go_on(learn, monkeypatch, "two-stopped", stage_2)
    first, second = folder("two"), folder("two-stopped")
    assert_same(weights(first), weights(second))
    assert losses(first) == losses(second)


def test_loader_processes_and_fresh_features_change_no_noise(learn, folder, monkeypatch):
    flags = ["--cache_features", "off"]
    assert learn("whole", *flags) == 0
    stop_and_go_on(learn, monkeypatch, "stopped", [*flags, "--num_workers", "2"])
    assert_same(weights(folder("stopped")), weights(folder("whole")))
    assert losses(folder("stopped")) == losses(folder("whole"))


def test_a_distilled_training_resumes(learn, folder, monkeypatch):
    assert learn("float", "--clb_stage", "0") == 0
    flags = ["--distill", "2", "--load_checkpoint", "dinomaly-float"]
    assert learn("whole", *flags) == 0
    stop_and_go_on(learn, monkeypatch, "stopped", flags)
    assert_same(weights(folder("stopped")), weights(folder("whole")))


def test_equal_seeds_give_equal_files_and_other_seeds_other_ones(learn, folder):
    for name, seed in (("first", "1"), ("again", "1"), ("other", "2")):
        assert learn(name, "--seed", seed) == 0
    first, again, other = map(folder, ("first", "again", "other"))
    assert_same(weights(first), weights(again))
    for file in ("results.csv", "bottle/scores.csv", "bottle/maps/contact_sheet.jpg"):
        assert (first / file).read_bytes() == (again / file).read_bytes()
    assert losses(first) == losses(again)
    assert not set(losses(first)) & set(losses(other))
    assert not torch.equal(weights(first)["bottleneck.0.fc1.weight"], weights(other)["bottleneck.0.fc1.weight"])
