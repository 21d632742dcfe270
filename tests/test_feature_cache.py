"""The feature cache: same numbers, encoded once, never half written."""

import os
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import utils.cache_plan
import utils.feature_cache
from common.errors import ResourceError
from datasets.few_shot import FewShotDataset
from datasets.mvtec import train_records
from datasets.records import ImageDataset
from tests.miniature import make_mvtec
from utils.arguments import base_parser, parse
from utils.array_file import content_key
from utils.cache_plan import plan_cache
from utils.categories import CategoryData, ModelData
from utils.feature_cache import FeatureDataset, bytes_per_image, cache_features, cached_count
from utils.hosts import INP_FORMER
from utils.prepared_data import prepare
from utils.settings import settings_of

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
    if mode == "auto":
        mode = plan_cache({"train": len(images)}, bytes_per_image(56, encode), mode, folder)["train"]
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


@pytest.mark.parametrize("shot", [(), ("--shot", "2")])
def test_bicubic_images_have_features_of_their_own(images, tiny_detector, tmp_path, shot):
    category = CategoryData("bottle", None, images.records[:2], [], [], [])
    model = ModelData("bottle", [category], one_of_many=True, variants=22 if shot else 1)
    found = {}
    for interpolation in ("bilinear", "bicubic"):
        flags = ["--data_path", "data", "--input_size", "60", "--crop_size", "56", "--save_dir", str(tmp_path), *shot]
        parser = base_parser("", INP_FORMER, ["few" if shot else "single"])
        settings = settings_of(parse(parser, [*flags, "--interpolation", interpolation, "--num_workers", "0"]))
        train = prepare(settings, model, tiny_detector, {"train": "disk", "test": "off"}, {"bottle"}).train
        plain = ImageDataset(images.records[:2], 60, 56, interpolation=interpolation)
        assert torch.equal(train[0]["image"], tiny_detector.encode(plain[0]["image"][None])[0].half().float())
        found[interpolation] = train[0]["image"]
    assert len(list(tmp_path.glob("feature_cache/*.npy"))) == 2
    assert not torch.equal(found["bilinear"], found["bicubic"])


def test_features_of_bilinear_images_keep_the_name_from_before_there_was_a_choice(images, tiny_detector, tmp_path):
    flags = [
        "--data_path",
        "data",
        "--input_size",
        "64",
        "--crop_size",
        "56",
        "--save_dir",
        str(tmp_path),
        "--num_workers",
        "0",
    ]
    settings = settings_of(parse(base_parser("", INP_FORMER, ["single"]), flags))
    prepare(
        settings,
        ModelData("bottle", [CategoryData("bottle", None, images.records, [], [], [])], True, 1),
        tiny_detector,
        {"train": "disk", "test": "off"},
        {"bottle"},
    )
    identity = {
        "encoder_sha256": tiny_detector.encoder.weights_sha256,
        "taps": tiny_detector.encoder.taps,
        **tiny_detector.feature_identity(),
        "pos_embed": "paper",
        "precision": "fp32",
        "format": 1,
        "input_size": 64,
        "crop_size": 56,
    }
    (file,) = tmp_path.glob("feature_cache/*.npy")
    assert file.stem == content_key(images.records, identity)


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
    monkeypatch.setattr(utils.cache_plan, "free_disk", lambda folder: 10)
    data = cached(images, encode, tmp_path / "cache", "auto")
    assert isinstance(data.features, np.ndarray)
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr(utils.cache_plan, "available_memory", lambda: 1)
    assert cached(images, encode, tmp_path / "cache", "auto") is images


def test_disk_that_is_too_small_is_one_sentence(images, encode, tmp_path, monkeypatch):
    def no_space(descriptor, offset, length):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", no_space)
    with pytest.raises(ResourceError, match="--cache_features ram"):
        cached(images, encode, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_disk_that_fills_up_while_encoding_is_one_sentence(images, encode, tmp_path, monkeypatch):
    def no_space(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(ResourceError, match=r"No space left on device.*--cache_features ram"):
        cached(images, encode, tmp_path / "cache")
    assert encode.images == 1 + 7
    assert not list((tmp_path / "cache").iterdir())


def test_size_is_known_before_encoding(images, encode, tmp_path):
    announced = bytes_per_image(56, encode) * len(images)
    assert encode.images == 1
    assert cached_count(images, IDENTITY, tmp_path) == 0
    cached(images, encode, tmp_path)
    (file,) = tmp_path.glob("*.npy")
    assert announced == 7 * 2 * 16 * 32 * 2  # images, groups of blocks, patches, channels, bytes of float16
    assert announced < file.stat().st_size <= announced + 128 + 40  # numpy's header and the hash
    assert cached_count(images, IDENTITY, tmp_path) == 7
    assert cached_count(images, {**IDENTITY, "precision": "bf16"}, tmp_path) == 0


def test_few_shot_variants_have_a_cache_of_their_own(images, encode, tmp_path, tiny_detector):
    few = FewShotDataset(ImageDataset(images.records[:2], 64, 56))
    plain = SimpleNamespace(**{name: getattr(few, name) for name in ("records", "input_size", "crop_size")}, identity={})
    plain_file, few_file = (utils.feature_cache._path(data, IDENTITY, tmp_path) for data in (plain, few))
    assert plain_file != few_file
    data = cached(few, encode, tmp_path)
    assert few_file.is_file()
    assert len(data) == 44
    for index in (0, 18, 43):
        direct = tiny_detector.encode(few.image(index).unsqueeze(0))[0].half().float()
        assert (data[index]["image"] - direct).abs().max() < 2e-3
    assert data[43]["path"] == str(images.records[1].path)


def test_a_loader_worker_is_sent_the_path_and_not_the_features(images, encode, tmp_path):
    data = cached(images, encode, tmp_path)
    message = pickle.dumps(data)
    assert len(message) < data.features.rows.nbytes / 2
    assert torch.equal(pickle.loads(message)[5]["image"], data[5]["image"])
    with pytest.raises(ValueError, match="read-only"):
        data.features[0][:] = 0
