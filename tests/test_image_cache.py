"""The cache of resized images: the same images to the last bit, in a file of the announced size."""

import logging
import os
from dataclasses import replace

import numpy as np
import PIL
import pytest
import torch
from PIL import Image

import utils.cache_plan
from common.errors import ResourceError, UserError
from datasets.records import ImageDataset, Record
from tests.miniature import save
from utils.array_file import content_key
from utils.image_cache import cache_images


@pytest.fixture
def images(tmp_path):
    """Photographs of several sizes, kinds and orientations."""
    generator = np.random.default_rng(0)
    colours = generator.integers(0, 256, (3, 90, 70, 3), dtype=np.uint8)
    turned = Image.Exif()
    turned[274] = 6  # orientation: turned by 90 degrees
    deep = generator.integers(0, 65536, (50, 50)).astype(np.uint16)
    paths = [
        save(tmp_path / "data" / "colour.png", colours[0]),
        save(tmp_path / "data" / "turned.jpg", colours[1], exif=turned),
        save(tmp_path / "data" / "grey.bmp", colours[2, ..., 0]),
        save(tmp_path / "data" / "deep.png", deep),
        save(tmp_path / "data" / "already.png", generator.integers(0, 256, (64, 64, 3), dtype=np.uint8)),
    ]
    return ImageDataset([Record(path, 0, "part") for path in paths], 64, 56)


@pytest.mark.parametrize("workers", [0, 2])
def test_cached_images_are_the_same_to_the_last_bit(images, tmp_path, workers):
    data = cache_images(images, "disk", tmp_path / "cache", workers, "test")
    assert data.resized is not None
    direct = [images[index] for index in range(5)]
    for record in images.records:
        record.path.write_bytes(b"")  # all pixels come from the cache
    for index in range(5):
        cached = data[index]
        assert torch.equal(cached["image"], direct[index]["image"])
        assert cached["path"] == direct[index]["path"]


def test_size_is_announced_and_the_file_found_again(images, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    cache_images(images, "disk", tmp_path / "cache", 0, "part train")
    (file,) = (tmp_path / "cache").iterdir()
    size = 5 * 64 * 64 * 3
    assert size < file.stat().st_size <= size + 128 + 40  # numpy's header and the hash
    assert caplog.messages[0].startswith("image cache: 5 part train images: 0.1 MB to be written")
    assert caplog.messages[0].endswith("--cache_images off goes without")
    made = file.stat().st_mtime_ns
    cache_images(images, "disk", tmp_path / "cache", 0, "part train")
    assert file.stat().st_mtime_ns == made
    assert "5 images found" in caplog.messages[-1]


def test_file_depends_on_images_and_size_but_not_on_the_crop(images, tmp_path):
    variants = [
        (images, 1),
        (ImageDataset(images.records, 64, 28), 1),
        (ImageDataset(images.records, 60, 56), 2),
        (ImageDataset(images.records[::-1], 64, 56), 3),
    ]
    for data, files in variants:
        cache_images(data, "disk", tmp_path / "cache", 0, "test")
        assert len(list((tmp_path / "cache").iterdir())) == files
    os.utime(images.records[0].path, ns=(1, 1))
    cache_images(images, "disk", tmp_path / "cache", 0, "test")
    assert len(list((tmp_path / "cache").iterdir())) == 4


def test_bicubic_images_have_a_file_of_their_own_and_are_the_same_to_the_last_bit(images, tmp_path):
    bilinear = cache_images(images, "disk", tmp_path / "cache", 0, "test")
    mask = save(tmp_path / "mask.png", np.random.default_rng(1).integers(0, 2, (90, 70), dtype=np.uint8))
    defective = replace(images.records[0], label=1, masks=(mask,))
    plain = ImageDataset([defective, *images.records[1:]], 64, 56, interpolation="bicubic")
    cached = cache_images(plain, "disk", tmp_path / "cache", 0, "test")
    assert len(list((tmp_path / "cache").iterdir())) == 2
    for index in range(5):
        assert torch.equal(cached[index]["image"], plain[index]["image"])
        assert torch.equal(cached[index]["mask"], plain[index]["mask"])
    assert cached[0]["mask"].any()
    assert not torch.equal(cached[0]["image"], bilinear[0]["image"])


def test_files_of_bilinear_images_keep_the_names_from_before_there_was_a_choice(images, tmp_path):
    cache_images(images, "disk", tmp_path / "cache", 0, "test")
    identity = {"resized_format": 1, "input_size": 64, "pillow": PIL.__version__}
    (file,) = (tmp_path / "cache").iterdir()
    assert file.stem == content_key(images.records, identity)


def test_file_that_was_cut_short_is_made_anew(images, tmp_path, caplog):
    first = cache_images(images, "disk", tmp_path / "cache", 0, "test")[2]["image"]
    (file,) = (tmp_path / "cache").iterdir()
    file.write_bytes(file.read_bytes()[:-1])
    again = cache_images(images, "disk", tmp_path / "cache", 0, "test")
    assert "is damaged or of an earlier version, and is made anew" in caplog.text
    assert torch.equal(again[2]["image"], first)


@pytest.mark.parametrize("workers", [0, 2])
def test_undecodable_image_is_named_and_leaves_no_file(images, tmp_path, workers):
    images.records[3].path.write_bytes(b"no image")
    with pytest.raises(UserError, match=r"deep\.png"):
        cache_images(images, "disk", tmp_path / "cache", workers, "test")
    assert not list((tmp_path / "cache").iterdir())


def test_off_and_full_disk(images, tmp_path, monkeypatch):
    assert cache_images(images, "off", tmp_path / "cache", 0, "test") is images
    monkeypatch.setattr(utils.cache_plan, "free_disk", lambda folder: 5 * 64 * 64 * 3 - 1)
    with pytest.raises(ResourceError, match="--cache_images off"):
        cache_images(images, "disk", tmp_path / "cache", 0, "test")
    assert not (tmp_path / "cache").exists()
