"""Encode every image once: without augmentation all that follows the frozen encoder is a function of its features.

Features are kept as float16, in RAM or in a memory-mapped file below `<save_dir>/feature_cache`, which later stages and
runs find again. A file's name is the hash of all that determines its content.
"""

import hashlib
import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from common.errors import ResourceError
from datasets.records import ImageDataset
from utils.loading import loaded_batches

logger = logging.getLogger(__name__)

_FORMAT = 1  # raise it when decoding, transforms or the stored numbers change
_LARGEST_SHARE = 0.5  # of the free disk or memory that "auto" may take


class FeatureDataset(Dataset):
    """The records of an image data set with encoded features in place of the image."""

    def __init__(self, images: ImageDataset, features: np.ndarray | Tensor):
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


def cache_features(
    images: ImageDataset,
    encode: Callable[[Tensor], Tensor],
    identity: dict,
    mode: str,
    folder: Path,
    batch_size: int,
    num_workers: int,
    description: str,
) -> ImageDataset | FeatureDataset:
    """The same records with cached features, or `images` itself if the mode is "off" or nothing is large enough.

    Args:
        encode: images (B, 3, H, W) on the CPU -> features on the CPU.
        identity: what besides the files determines the features: weights' hash, taps, transform, precision.
        mode: off, ram, disk, or auto (disk if it takes at most half of the free space, else RAM likewise, else off).
    """
    if mode == "off" or not len(images):
        return images
    path = folder / f"{_key(images, identity)}.npy"
    found = _read(path, len(images)) if mode != "ram" and path.is_file() else None
    if found is not None:
        logger.info("feature cache: %s: %d images found in %s", description, len(images), path)
        return FeatureDataset(images, found)
    shape = (len(images), *encode(images.image(0).unsqueeze(0)).shape[1:])
    size = 2 * int(np.prod(shape))
    place = _choose_place(mode, size, folder)
    if place == "off":
        logger.warning(
            "feature cache: %s needs %.1f GB, too much for disk and memory; encoding anew each time",
            description,
            size / 1e9,
        )
        return images
    started = time.perf_counter()
    if place == "ram":
        features: np.ndarray = np.empty(shape, np.float16)
        _fill(features, images, encode, batch_size, num_workers, description)
    else:
        features = _fill_file(path, shape, images, encode, batch_size, num_workers, description)
    seconds = time.perf_counter() - started
    logger.info(
        "feature cache: %s: %d images encoded in %.1f s, %.1f MB in %s (float16); "
        "every further pass over them skips the encoder (%.3f s per image)",
        description,
        len(images),
        seconds,
        size / 1e6,
        path if place == "disk" else "RAM",
        seconds / len(images),
    )
    return FeatureDataset(images, features)


def _read(path: Path, count: int) -> np.ndarray | None:
    """A complete cache file, or None for a damaged one."""
    try:
        features = np.load(path, mmap_mode="r")
        if len(features) == count and features.dtype == np.float16:
            return features
    except (OSError, ValueError):
        pass
    logger.warning("feature cache: %s is damaged and is made anew", path)
    return None


def _key(images: ImageDataset, identity: dict) -> str:
    files = []
    for record in images.records:
        status = record.path.stat()
        files.append((str(record.path.resolve()), status.st_size, status.st_mtime_ns))
    content = {**identity, "format": _FORMAT, "input_size": images.input_size, "crop_size": images.crop_size, "files": files}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def _choose_place(mode: str, size: int, folder: Path) -> str:
    if mode != "auto":
        return mode
    existing = next(parent for parent in (folder, *folder.resolve().parents) if parent.is_dir())
    if size <= _LARGEST_SHARE * shutil.disk_usage(existing).free:
        return "disk"
    if size <= _LARGEST_SHARE * os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
        return "ram"
    return "off"


def _fill(
    features: np.ndarray, images: ImageDataset, encode: Callable, batch_size: int, num_workers: int, description: str
) -> None:
    done = 0
    with (
        loaded_batches(_ImagesAlone(images), num_workers, batch_size=batch_size) as batches,
        tqdm(total=len(images), desc=f"encoding {description}", unit="image", disable=None) as bar,
    ):
        for batch in batches:
            encoded = encode(batch).to(torch.float16).numpy()
            features[done : done + len(encoded)] = encoded
            done += len(encoded)
            bar.update(len(encoded))


def _fill_file(path: Path, shape: tuple[int, ...], *arguments) -> np.ndarray:
    """Fill a temporary file and give it its name when complete, so that a name always means complete content."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        features = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.float16, shape=shape)
        _reserve(temporary)
        _fill(features, *arguments)
        features.flush()
        os.replace(temporary, path)
    except OSError as error:
        raise ResourceError(
            f"feature cache: cannot write {str(path)!r} ({error.strerror or error}); make room, or give "
            "--cache_features ram or off"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    return np.load(path, mmap_mode="r")


def _reserve(path: Path) -> None:
    """Take the disk space now: a mapped file that outgrows the disk later would kill the process."""
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


class _ImagesAlone(Dataset):
    def __init__(self, images: ImageDataset):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images.image(index)
