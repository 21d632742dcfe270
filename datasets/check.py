"""Read a whole category and report what is wrong with it, before a training does."""

import hashlib
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from common.errors import UserError
from datasets.images import load_image, load_mask
from datasets.records import Record, check_mask_sizes


def undecodable(records: Iterable[Record], max_pixels: int) -> list[tuple[Record, str]]:
    """Records whose image or mask cannot be decoded, with the reason; decodes every file."""
    bad = []
    for record in records:
        try:
            load_image(record.path, max_pixels)
            for mask in record.masks:
                load_mask(mask, max_pixels)
        except UserError as error:
            bad.append((record, str(error)))
    return bad


def mask_faults(record: Record, max_pixels: int) -> tuple[list[str], list[str]]:
    """(errors, warnings) on the masks of a decodable record: another size than the image, or no pixel marked."""
    errors, warnings = [], []
    try:
        check_mask_sizes([record], max_pixels)
    except UserError as error:
        errors.append(str(error))
    if record.masks and not any(np.asarray(load_mask(mask, max_pixels)).any() for mask in record.masks):
        warnings.append(f"empty mask: {str(record.masks[0])!r} marks no pixel although its image is defective")
    return errors, warnings


def shared_images(train: list[Record], test: list[Record]) -> list[tuple[Path, Path]]:
    """Pairs (training image, test image) with identical bytes; only files of equal size are read."""
    by_size: dict[int, list[Path]] = defaultdict(list)
    for record in train:
        by_size[record.path.stat().st_size].append(record.path)
    known: dict[int, dict[str, Path]] = {}
    pairs = []
    for record in test:
        size = record.path.stat().st_size
        if size not in by_size:
            continue
        if size not in known:
            known[size] = {_content_hash(path): path for path in by_size[size]}
        twin = known[size].get(_content_hash(record.path))
        if twin is not None:
            pairs.append((twin, record.path))
    return pairs


def _content_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
