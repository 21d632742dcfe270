"""Dinomaly with cached features: dropout comes after the encoder, so cached and uncached trainings agree."""

import json
from pathlib import Path

import numpy as np
import pytest

import Binary_Dinomaly
import Binary_INP_Multi_Class
import utils.training
from models.dinomaly import Dinomaly
from models.inp_former import INPFormer
from tests.conftest import command_line, run_folder
from tests.miniature import make_mvtec

ITERATIONS = 10
TRAIN, TEST, PATCHES, CHANNELS = 8, 4, 16, 32
ROUNDING = 3e-4  # relative difference of a loss by features of 11 bits; found: at most 6e-5

DISK = ("--cache_features", "disk")
OTHER_OPTIONS = [
    ("--bottleneck_dropout", "0.5", "--mining_final", "0.5"),
    ("--groups", "1", "--remove_class_token"),
    ("--recentre", "--decoder_attention", "softmax", "--clb_stage", "0"),
]


@pytest.fixture
def learn(tmp_path, monkeypatch):
    """Train with a log line for every iteration; returns the losses."""
    monkeypatch.setattr("utils.settings._LOG_EVERY", 1)
    data = make_mvtec(tmp_path / "data", train=TRAIN, good=TEST // 2, defective=TEST // 2)

    def call(save_name: str, *flags: str, script=Binary_Dinomaly) -> np.ndarray:
        words = ("--total_iters", str(ITERATIONS), "--quiet", "--save_name", save_name, *flags)
        assert script.main(command_line(tmp_path, data, "Folder", *words)) == 0
        log = run_folder(tmp_path, save_name) / "metrics.jsonl"
        found = [line["loss"] for line in map(json.loads, log.open()) if line["kind"] == "training"]
        assert len(found) == ITERATIONS
        return np.array(found)

    return call


@pytest.fixture
def encoded(monkeypatch) -> list[int]:
    """How many images each call encoded, of either network; single ones are blanks that only show the shape."""
    counts: list[int] = []
    for network in (Dinomaly, INPFormer):

        def count(detector, images, original=network.encode):
            counts.append(len(images))
            return original(detector, images)

        monkeypatch.setattr(network, "encode", count)
    return counts


@pytest.mark.parametrize("flags", [(), ("--decoder_attention", "softmax"), ("--recentre", "--groups", "1")], ids=str)
def test_cached_and_uncached_trainings_agree_in_every_iteration(learn, monkeypatch, flags):
    flags = ("--clb_stage", "0", *flags)  # a bit that rounding flips would be no small difference
    uncached = learn("dinomaly-off", *flags, "--cache_features", "off")
    cached = learn("dinomaly-ram", *flags, "--cache_features", "ram")
    original = utils.training._noise_seed
    monkeypatch.setattr(utils.training, "_noise_seed", lambda seed, iteration: original(seed + 1, iteration))
    other_noise = learn("dinomaly-noise", *flags, "--cache_features", "ram")
    rounding, noise = (abs(found / uncached - 1) for found in (cached, other_noise))
    assert 0 < rounding.max() < ROUNDING
    assert noise.min() > 3 * rounding.max()
    assert noise.max() > 10 * ROUNDING


def shapes(folder: Path) -> list[tuple[int, ...]]:
    return sorted(np.load(path, mmap_mode="r").shape for path in folder.glob("*.npy"))


@pytest.mark.parametrize("inp_first", [True, False])
def test_options_share_a_cache_that_is_not_the_other_hosts(learn, encoded, tmp_path, inp_first):
    """Dinomaly's features hold the class token, INP-Former's do not; every image is encoded once for each."""
    first_files = [(count, 2, PATCHES + (not inp_first), CHANNELS) for count in (TEST, TRAIN)]
    all_files = [(count, 2, tokens, CHANNELS) for count in (TEST, TRAIN) for tokens in (PATCHES, PATCHES + 1)]
    hosts = [("INP-Former", Binary_INP_Multi_Class), ("dinomaly", Binary_Dinomaly)]
    for (save_name, script), files in zip(hosts[:: 1 if inp_first else -1], (first_files, all_files), strict=True):
        encoded.clear()
        learn(save_name, *DISK, script=script)
        assert shapes(tmp_path / "runs" / "feature_cache") == files
        assert sum(count for count in encoded if count > 1) == TRAIN + TEST
    encoded.clear()
    for number, flags in enumerate(OTHER_OPTIONS):
        learn(f"dinomaly-{number}", *DISK, *flags)
    assert shapes(tmp_path / "runs" / "feature_cache") == all_files
    assert max(encoded) == 1
