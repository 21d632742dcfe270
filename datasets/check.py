"""Read a whole category and report what is wrong with it, before a training does."""

import hashlib
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from common.errors import UserError
from datasets.images import DEFAULT_MAX_PIXELS, load_image, load_mask
from datasets.records import Record, mask_size_differs


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


def record_faults(record: Record, max_pixels: int = DEFAULT_MAX_PIXELS) -> tuple[list[str], list[str]]:
    """(errors, warnings) on one record: files that cannot be decoded, masks of another size than the image, no pixel marked."""
    errors, marked = [], False
    size = None
    try:
        size = load_image(record.path, max_pixels).size
    except UserError as error:
        errors.append(str(error))
    for path in record.masks:
        try:
            mask = load_mask(path, max_pixels)
        except UserError as error:
            errors.append(str(error))
            continue
        if size not in (None, mask.size):
            errors.append(mask_size_differs(path, mask.size, record.path, size))
        marked = marked or mask.getbbox() is not None
    if errors or marked or not record.masks:
        return errors, []
    return [], [f"empty mask: {str(record.masks[0])!r} marks no pixel although its image is defective"]


def shared_images(train: Iterable[Record], test: Iterable[Record]) -> list[tuple[Path, Path]]:
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
