"""Decode and resize every image once: for large photographs that are read anew in every epoch.

A file below `<save_dir>/image_cache` holds the resized pixels as PIL gives them, so the images that follow are the same to
the last bit. It is of use where features are not cached; masks are always read from their files.
"""

import logging
import time
from pathlib import Path

import numpy as np
import PIL

from datasets.records import ImageDataset
from datasets.transforms import interpolation_entry
from utils.array_file import ArrayFile, MappedArray, content_key, loaded_rows, open_array
from utils.cache_plan import plan_cache, size_text
from utils.distributed import on_main

logger = logging.getLogger(__name__)

_FORMAT = 1  # raise it when decoding or resizing changes
_BLOCK = 32  # images that a loader worker hands over at a time


def cache_images(images: ImageDataset, mode: str, folder: Path, num_workers: int, description: str) -> ImageDataset:
    """The same data set reading resized images from one file, made now unless it exists; `images` itself for "off".

    Raises:
        ResourceError: the disk has no room for it.
    """
    if mode == "off" or not len(images):
        return images
    size = images.input_size
    file = ArrayFile(
        on_main(lambda: folder / f"{_key(images)}.npy"), len(images), (size, size, 3), np.uint8, "image", alternatives="off"
    )
    if on_main(lambda: open_array(file.path, file.count, file.dtype, file.subject) is not None):
        logger.info("image cache: %s: %d images found in %s", description, file.count, file.path)
    else:
        plan_cache({description: file.count}, file.row_bytes, mode, folder, subject=file.subject)
        started = time.perf_counter()
        label = f"resizing {description}"
        file.make(lambda part: loaded_rows(images.resized_image, part, _BLOCK, num_workers, label), _BLOCK)
        logger.info(
            "image cache: %s: %d images of %dx%d in %.1f s, %s in %s",
            description,
            file.count,
            size,
            size,
            time.perf_counter() - started,
            size_text(file.bytes),
            file.path,
        )
    resized = MappedArray(file.path)
    return ImageDataset(images.records, size, images.crop_size, images.max_pixels, resized, images.interpolation)


def _key(images: ImageDataset) -> str:
    content = {"resized_format": _FORMAT, "input_size": images.input_size, "pillow": PIL.__version__}
    return content_key(images.records, {**content, **interpolation_entry(images.interpolation)})
