"""VisA: prepared as folders in MVTec layout, or as downloaded, where `split_csv/1cls.csv` says what each image is."""

import os
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError
from common.readers import Line, read_table
from datasets import mvtec
from datasets.images import list_images
from datasets.listing import (
    DEFAULT_OPTIONS,
    ListingOptions,
    defective_record,
    enumerated,
    index_source,
    joined,
    report_unmasked,
)
from datasets.records import Record

SPLIT = Path("split_csv", "1cls.csv")
TREE = (
    "1cls/<item>/{train/good,test/good,test/bad}/*.JPG and 1cls/<item>/ground_truth/bad/<stem>.png, or as downloaded "
    f"{SPLIT.as_posix()}, <item>/Data/Images/{{Normal,Anomaly}}/*.JPG and <item>/Data/Masks/Anomaly/*.png"
)
FORM = mvtec.Form(tree=TREE)
_COLUMNS = ("object", "split", "label", "image", "mask")
_SPLITS = ("train", "test")
_DEFECTIVE = "anomaly"
_LABELS = ("normal", _DEFECTIVE)


@dataclass(frozen=True)
class _Row:
    where: str
    label: str
    image: Path
    mask: Path | None


def _prepared_root(root: Path) -> Path | None:
    """Folder of the prepared categories, or None if `root` holds VisA as downloaded."""
    if (root / "1cls").is_dir():
        return root / "1cls"
    return None if (root / SPLIT).is_file() else root


def _lines(path: Path) -> list[Line]:
    source = index_source(path, "VisA split")
    names, lines = read_table(source, (), further=True, own=False)
    if not set(_COLUMNS) <= set(names):
        raise source.damaged(f"has unknown columns in line 1; it must have the columns {','.join(_COLUMNS)}")
    return lines


def _rows(root: Path, item: str, split: str) -> list[_Row]:
    """Lines of the csv for one category and split, checked; their files may be missing."""
    path = root / SPLIT
    rows = []
    for line in _lines(path):
        where = f"line {line.number} of {str(path)!r}"
        name, part, label, image, mask = (line.cells[column] for column in _COLUMNS)
        if part not in _SPLITS or label not in _LABELS or not image:
            raise UserError(
                f"VisA split damaged: {where} has split {part!r:.50}, label {label!r:.50} and image {image!r:.200}; expected train or test, "
                "normal or anomaly, and a path; download it again"
            )
        if (name, part) == (item, split):
            rows.append(_Row(where, label, joined(root, image, where), joined(root, mask, where) if mask else None))
    if not rows:
        raise UserError(
            f"VisA split has no {split} images of {item!r}: {str(path)!r}; download it again or name others by --item"
        )
    return rows


def _listed(rows: list[_Row], item: str, options: ListingOptions) -> list[Record]:
    """Records in order of label and file name, as the prepared folders give them."""
    absent = {row.image: None for row in rows if not os.path.isfile(row.image)}
    if absent:
        options.on_fault(f"{len(absent)} VisA images of {item!r} are missing: {enumerated(absent)}; unpack the data set again")
    records = []
    for row in sorted(rows, key=lambda row: (row.label == _DEFECTIVE, row.image)):
        if row.image in absent:
            continue
        if row.label != _DEFECTIVE:
            records.append(Record(row.image, 0, item))
            continue
        records.append(defective_record(row.image, row.mask, item, _DEFECTIVE))
    report_unmasked(records, f"VisA images of {item!r}", options)
    return records


def train_records(root: Path, item: str, options: ListingOptions = DEFAULT_OPTIONS) -> list[Record]:
    """Good images to train on; raises UserError if there are none or the csv is damaged."""
    prepared = _prepared_root(root)
    if prepared is not None:
        return mvtec.train_records(prepared, item, options, FORM)
    rows = _rows(root, item, "train")
    for row in rows:
        if row.label == _DEFECTIVE:
            options.on_fault(
                f"VisA split damaged: {row.where} trains on the defective image {str(row.image)!r}; download it again"
            )
    return [record for record in _listed(rows, item, options) if record.label == 0]


def test_records(root: Path, item: str, options: ListingOptions = DEFAULT_OPTIONS) -> list[Record]:
    """Test images; raises UserError if there are none, masks are missing or the csv is damaged."""
    prepared = _prepared_root(root)
    if prepared is not None:
        return mvtec.test_records(prepared, item, options, FORM)
    return _listed(_rows(root, item, "test"), item, options)


def stray_masks(root: Path, item: str, options: ListingOptions = DEFAULT_OPTIONS) -> list[Path]:
    """Masks that no test image has."""
    prepared = _prepared_root(root)
    if prepared is not None:
        return mvtec.stray_masks(prepared, item, options, FORM)
    folder, known = root / item / "Data" / "Masks" / "Anomaly", {row.mask for row in _rows(root, item, "test")}
    return [path for path in list_images(folder) if path not in known] if folder.is_dir() else []
