"""Encode every image once: without augmentation all that follows the frozen encoder is a function of its features.

Features are kept as float16, in RAM or in a memory-mapped file below `<save_dir>/feature_cache`, which later stages and
runs find again. A file's name is the hash of all that determines its content.
"""

import logging
import time
from collections.abc import Callable, Generator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from utils.array_file import ArrayFile, Blocks, MappedArray, content_key, loaded_rows, open_array
from utils.cache_plan import size_text
from utils.distributed import on_main

logger = logging.getLogger(__name__)

_FORMAT = 1  # raise it when decoding, transforms or the stored numbers change


class FeatureDataset(Dataset):
    """The records of an image data set with encoded features in place of the image."""

    def __init__(self, images: Dataset, features: np.ndarray | MappedArray):
        self.images = images
        self.features = features

    @property
    def records(self) -> list:
        return self.images.records

    def __len__(self) -> int:
        return len(self.images)

    def image(self, index: int) -> Tensor:
        """Features of one image as float32."""
        return torch.as_tensor(np.array(self.features[index])).float()

    def annotations(self, index: int) -> dict:
        """As `ImageDataset.annotations`."""
        return self.images.annotations(index)

    def __getitem__(self, index: int) -> dict:
        return {"image": self.image(index), **self.annotations(index)}


def bytes_per_image(crop_size: int, encode: Callable[[Tensor], Tensor]) -> int:
    """Bytes that one image's features take, from encoding a blank one."""
    return 2 * int(np.prod(_row_shape(crop_size, encode)))


def cached_count(images: Dataset, identity: dict, folder: Path) -> int:
    """How many of the images have their features on disk: all or none."""
    return len(images) if on_main(lambda: _is_complete(_path(images, identity, folder), len(images))) else 0


def cache_features(
    images: Dataset,
    encode: Callable[[Tensor], Tensor],
    identity: dict,
    place: str,
    folder: Path,
    batch_size: int,
    num_workers: int,
    description: str,
) -> Dataset:
    """The same records with cached features, or `images` itself if the place is "off".

    Args:
        images: `ImageDataset`, or what has its `records`, `image`, `annotations`, sizes and `identity`.
        encode: images (B, 3, H, W) on the CPU -> features on the CPU.
        identity: what besides the images determines the features: weights' hash, taps, transform, precision.
        place: off, ram or disk, as `plan_cache` found or the user asked.
    """
    if place == "off" or not len(images):
        return images
    path = on_main(lambda: _path(images, identity, folder))
    if place != "ram" and on_main(lambda: _is_complete(path, len(images))):
        logger.info("feature cache: %s: %d images found in %s", description, len(images), path)
        return FeatureDataset(images, MappedArray(path))
    file = ArrayFile(path, len(images), _row_shape(images.crop_size, encode), np.float16, "feature", "ram or off")
    started = time.perf_counter()

    def encoded(part: range) -> Generator[np.ndarray, None, None]:
        for batch in loaded_rows(images.image, part, batch_size, num_workers, f"encoding {description}"):
            yield encode(batch).to(torch.float16).numpy()

    if place == "ram":
        features: np.ndarray | MappedArray = _in_memory(file, encoded)
    else:
        file.make(encoded, batch_size)
        features = MappedArray(path)
    seconds = time.perf_counter() - started
    logger.info(
        "feature cache: %s: %d images encoded in %.1f s, %s in %s (float16); "
        "every further pass over them skips the encoder (%.3f s per image)",
        description,
        len(images),
        seconds,
        size_text(file.bytes),
        path if place == "disk" else "RAM",
        seconds / len(images),
    )
    return FeatureDataset(images, features)


def _row_shape(crop_size: int, encode: Callable[[Tensor], Tensor]) -> tuple[int, ...]:
    return tuple(encode(torch.zeros(1, 3, crop_size, crop_size)).shape[1:])


def _path(images: Dataset, identity: dict, folder: Path) -> Path:
    sizes = {"input_size": images.input_size, "crop_size": images.crop_size}
    return folder / f"{content_key(images.records, {**identity, **images.identity, 'format': _FORMAT, **sizes})}.npy"


def _is_complete(path: Path, count: int) -> bool:
    return open_array(path, count, np.float16, "feature") is not None


def _in_memory(file: ArrayFile, blocks: Blocks) -> np.ndarray:
    rows, done = np.empty((file.count, *file.row_shape), file.dtype), 0
    for block in blocks(range(file.count)):
        rows[done : done + len(block)] = block
        done += len(block)
    return rows
