"""Real-IAD: `<json folder>/<item>.json` lists the images of `realiad_1024/<item>/`; `--realiad_json` names the folder.

All views are used. The noisy training sets (`realiad_jsons_fuiad_*`) hold defective images on purpose: whatever a training
record's class is, it is trained on as if it were good.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError
from common.readers import read_json
from datasets.images import list_images
from datasets.listing import (
    DEFAULT_OPTIONS,
    Inside,
    ListingOptions,
    defective_record,
    enumerated,
    index_source,
    joined,
    leaves_folder,
    report_unmasked,
)
from datasets.records import Record

IMAGES = "realiad_1024"
TREE = f"{IMAGES}/<item>/..., realiad_jsons/realiad_jsons/<item>.json"
GOOD = "OK"
# pit, deformation, abrasion, scratch, damage, missing parts, foreign objects, contamination
DEFECTS = ("AK", "BX", "CH", "HS", "PS", "QS", "YW", "ZW")


@dataclass(frozen=True)
class _Entry:
    image: Path
    mask: Path | None
    kind: str


def _index_file(root: Path, item: str, name: str) -> Path:
    """`<item>.json` of a json folder, which the archives nest in a folder of the same name; raises UserError if there is none."""
    if leaves_folder(name) or len(Path(name).parts) != 1:
        raise UserError(f"--realiad_json {name!r} must be the name of a folder in {str(root)!r}, not a path")
    folders = [root / name / name, root / name]
    if not folders[1].is_dir():
        present = sorted(path.name for path in root.iterdir() if path.is_dir() and path.name.startswith("realiad_jsons"))
        raise UserError(
            f"--realiad_json {name!r} is no folder in {str(root)!r}; "
            + (f"choose from {' '.join(present)}" if present else f"expected {TREE}")
        )
    return next(
        (folder / f"{item}.json" for folder in folders if (folder / f"{item}.json").is_file()), folders[0] / f"{item}.json"
    )


def _entries(root: Path, item: str, split: str, options: ListingOptions) -> list[_Entry]:
    path = _index_file(root, item, options.realiad_json)
    content = read_json(index_source(path, "Real-IAD index"), object)
    records = content.get(split) if isinstance(content, dict) else None
    if not isinstance(records, list) or not records:
        raise UserError(
            f"Real-IAD index damaged: {str(path)!r} has no list {split!r} of records; expected an object with train and test; "
            "download it again"
        )
    folder = root / IMAGES / item
    inside = Inside(root, folder)  # a category may be a link to another disk
    return [
        _entry(record, folder, inside, f"record {number} of {split!r} in {str(path)!r}")
        for number, record in enumerate(records, 1)
    ]


def _entry(record, folder: Path, inside: Inside, where: str) -> _Entry:
    """One record, checked; its files may be missing."""
    if not isinstance(record, dict):
        raise UserError(f"Real-IAD index damaged: {where} is no object; download it again")
    missing = [key for key in ("image_path", "anomaly_class") if key not in record]
    if missing:
        raise UserError(f"Real-IAD index damaged: {where} has no {missing[0]!r}; download it again")
    image, mask, kind = record["image_path"], record.get("mask_path"), record["anomaly_class"]
    if not isinstance(image, str) or not image or not isinstance(mask, str | None):
        raise UserError(
            f"Real-IAD index damaged: {where} has the paths {image!r:.200} and {mask!r:.200}; expected text; download it again"
        )
    if kind != GOOD and kind not in DEFECTS:
        raise UserError(
            f"Real-IAD index damaged: {where} has the unknown anomaly_class {kind!r:.50}; expected {GOOD} {' '.join(DEFECTS)}; "
            "download it again"
        )
    paths = [joined(folder, name, where) if name else None for name in (image, mask)]
    for path in paths:
        if path is not None and not inside.holds(path):
            raise UserError(
                f"path refused: {where} leaves the data set by a symbolic link: {str(path)!r}; put the file itself into "
                f"{str(folder)!r}"
            )
    return _Entry(*paths, kind)


def _existing(entries: list[_Entry], item: str, split: str, options: ListingOptions) -> list[_Entry]:
    absent = [entry.image for entry in entries if not os.path.isfile(entry.image)]
    if absent:
        options.on_fault(
            f"{len(absent)} {split} images of Real-IAD {item!r} are missing: {enumerated(absent)}; unpack {IMAGES} again"
        )
    gone = set(absent)
    return [entry for entry in entries if entry.image not in gone]


def train_records(root: Path, item: str, options: ListingOptions = DEFAULT_OPTIONS) -> list[Record]:
    """All training images as good ones; raises UserError if the index or an image is missing or damaged."""
    entries = _existing(_entries(root, item, "train", options), item, "training", options)
    return [Record(entry.image, 0, item) for entry in entries]


def test_records(root: Path, item: str, options: ListingOptions = DEFAULT_OPTIONS) -> list[Record]:
    """Test images in the order of the index; a mask of a good one is not read.

    Raises:
        UserError: the index is absent or damaged, an image or a defective image's mask is missing.
    """
    records = []
    for entry in _existing(_entries(root, item, "test", options), item, "test", options):
        if entry.kind == GOOD:
            records.append(Record(entry.image, 0, item))
            continue
        records.append(defective_record(entry.image, entry.mask, item, entry.kind))
    report_unmasked(records, f"images of Real-IAD {item!r}", options)
    return records


def stray_masks(root: Path, item: str, options: ListingOptions = DEFAULT_OPTIONS) -> list[Path]:
    """Masks beside the masks of test images, that belong to no image there; other json folders may list the others."""
    entries = _entries(root, item, "test", options)
    strays = []
    for folder in sorted({entry.mask.parent for entry in entries if entry.mask is not None}):
        files = list_images(folder) if folder.is_dir() else []
        stems = {path.stem for path in files if path.suffix.lower() != ".png"}
        strays += [path for path in files if path.suffix.lower() == ".png" and path.stem not in stems]
    return strays
