"""ELPV: electroluminescence photographs of solar cells, labelled per image (package `elpv-dataset`, CC BY-NC-SA 4.0).

Probability 0 is good, 1 defective; the doubtful cells in between are left out. Good cells are split 80/20 into training
and test by a hash of their file name, so the split is the same everywhere.
"""

import hashlib
import importlib.util
import os
from pathlib import Path

from common.errors import UserError
from common.readers import read_text
from datasets.listing import DEFAULT_OPTIONS, ListingOptions, index_source, joined
from datasets.records import Record

CATEGORIES = ["mono", "poly"]
_LABELS = "labels.csv"
TREE = "labels.csv, images/*.png"


def installed_root() -> Path:
    """Data folder of the installed `elpv-dataset` package; raises UserError if it is not installed."""
    package = importlib.util.find_spec("elpv_dataset")
    if package is None:
        raise UserError("ELPV not found: `pip install elpv-dataset==1.0.0.post1`, or give its data folder as --data_path")
    return Path(package.origin).parent / "data"


def _is_training_cell(name: str) -> bool:
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % 5 != 0


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise ValueError(f"{text} is no probability")
    return value


def _cells(root: Path, item: str) -> list[tuple[Path, float]]:
    labels = root / _LABELS
    cells = []
    for number, line in enumerate(read_text(index_source(labels, "ELPV labels")).splitlines(), 1):
        try:
            name, probability, kind = line.split()
            probability = _share(probability)
        except ValueError as error:
            raise UserError(
                f"ELPV labels damaged: line {number} of {str(labels)!r} is {line!r:.100}, expected 'path probability type'"
            ) from error
        path = joined(root, name, f"line {number} of {str(labels)!r}")
        if kind == item and not os.path.isfile(path):
            raise UserError(f"ELPV image missing: line {number} of {str(labels)!r} names {name!r}, which does not exist")
        if kind == item:
            cells.append((path, probability))
    if not cells:
        raise UserError(f"ELPV has no cells of type {item!r} in {str(labels)!r}")
    return sorted(cells)


def train_records(root: Path, item: str, options: ListingOptions = DEFAULT_OPTIONS) -> list[Record]:
    """Four fifths of the good cells."""
    return [Record(path, 0, item) for path, p in _cells(root, item) if p == 0 and _is_training_cell(path.name)]


def test_records(root: Path, item: str, options: ListingOptions = DEFAULT_OPTIONS) -> list[Record]:
    """The other good cells and all surely defective ones."""
    return [
        Record(path, int(p), item, kind="defective" if p == 1 else "")
        for path, p in _cells(root, item)
        if p == 1 or (p == 0 and not _is_training_cell(path.name))
    ]
