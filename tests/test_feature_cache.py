"""The feature cache: same numbers, encoded once, never half written."""

import os
from collections import namedtuple

import numpy as np
import pytest
import torch

import utils.feature_cache
from common.errors import ResourceError
from datasets.mvtec import train_records
from datasets.records import ImageDataset
from tests.miniature import make_mvtec
from utils.feature_cache import FeatureDataset, cache_features

IDENTITY = {"encoder_sha256": "a", "precision": "fp32"}


class Counter:
    """The tiny encoder, counting the images it sees."""

    def __init__(self, detector):
        self.detector, self.images = detector, 0

    def __call__(self, batch: torch.Tensor) -> torch.Tensor:
        self.images += len(batch)
        return self.detector.encode(batch)


@pytest.fixture
def images(tmp_path):
    return ImageDataset(train_records(make_mvtec(tmp_path / "data", train=7), "bottle"), 64, 56)


@pytest.fixture
def encode(tiny_detector):
    return Counter(tiny_detector)


def cached(images, encode, folder, mode="disk", workers=0, **identity):
    return cache_features(images, encode, {**IDENTITY, **identity}, mode, folder, 3, workers, "test")


@pytest.mark.parametrize("mode", ["ram", "disk", "auto"])
@pytest.mark.parametrize("workers", [0, 2])
def test_cached_features_are_the_direct_ones_in_float16(images, encode, tmp_path, tiny_detector, mode, workers):
    data = cached(images, encode, tmp_path / "cache", mode, workers)
    assert isinstance(data, FeatureDataset)
    for index in (0, 3, 6):
        direct = tiny_detector.encode(images[index]["image"].unsqueeze(0))[0]
        assert torch.equal(data[index]["image"], direct.half().float())
        assert data[index]["path"] == images[index]["path"]
    features = torch.stack([data[index]["image"] for index in range(7)])
    pictures = torch.stack([images[index]["image"] for index in range(7)])
    loss, _ = tiny_detector.training_loss(features)
    exact, _ = tiny_detector.training_loss(pictures)
    assert loss.item() == pytest.approx(exact.item(), rel=1e-3)
    assert (tiny_detector.anomaly_map(features) - tiny_detector.anomaly_map(pictures)).abs().max() < 2e-3


def test_disk_cache_is_found_again(images, encode, tmp_path):
    first = cached(images, encode, tmp_path)
    seen = encode.images
    second = cached(images, encode, tmp_path)
    assert encode.images == seen
    assert torch.equal(first[4]["image"], second[4]["image"])
    assert len(list(tmp_path.glob("*.npy"))) == 1


def test_whatever_changes_the_features_changes_the_key(images, encode, tmp_path):
    variants = [
        lambda: cached(images, encode, tmp_path),
        lambda: cached(images, encode, tmp_path, encoder_sha256="b"),
        lambda: cached(images, encode, tmp_path, precision="bf16"),
        lambda: cached(ImageDataset(images.records, 60, 56), encode, tmp_path),
        lambda: cached(ImageDataset(images.records[1:], 64, 56), encode, tmp_path),
    ]
    for count, variant in enumerate(variants, 1):
        variant()
        assert len(list(tmp_path.glob("*.npy"))) == count
    os.utime(images.records[0].path, ns=(1, 1))
    cached(images, encode, tmp_path)
    assert len(list(tmp_path.glob("*.npy"))) == len(variants) + 1


def test_interrupted_encoding_leaves_nothing(images, encode, tmp_path):
    def fail_late(batch):
        if encode.images > 3:
            raise KeyboardInterrupt
        return encode(batch)

    with pytest.raises(KeyboardInterrupt):
        cached(images, fail_late, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_off_encodes_nothing(images, encode, tmp_path):
    assert cached(images, encode, tmp_path, "off") is images
    assert encode.images == 0


def test_auto_goes_from_disk_to_memory_to_nothing(images, encode, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(utils.feature_cache.shutil, "disk_usage", lambda path: usage(10, 0, 10))
    data = cached(images, encode, tmp_path / "cache", "auto")
    assert isinstance(data.features, np.ndarray)
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr(utils.feature_cache.os, "sysconf", lambda name: 1)
    assert cached(images, encode, tmp_path / "cache", "auto") is images


def test_disk_that_is_too_small_is_one_sentence(images, encode, tmp_path, monkeypatch):
    def no_space(descriptor, offset, length):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(utils.feature_cache.os, "posix_fallocate", no_space)
    with pytest.raises(ResourceError, match="--cache_features ram"):
        cached(images, encode, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())
