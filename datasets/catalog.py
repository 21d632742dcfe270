"""The data sets by the name that `--dataset` takes."""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError
from datasets import elpv, mvtec
from datasets.records import Record


RESERVED_ITEM = "Mean"


@dataclass(frozen=True)
class Layout:
    """How to list a data set: its categories, then the records of one category.

    Attributes:
        categories: root -> names in the published order.
        train: (root, item) -> records.
        test: (root, item, allow_missing_masks) -> records.
        published_counts: item -> (train, test good, test defective), where published.
        tree: what lies below the root, for messages.
        default_root: where the data set is when `--data_path` is not given.
    """

    categories: Callable[[Path], list[str]]
    train: Callable[[Path, str], list[Record]]
    test: Callable[[Path, str, bool], list[Record]]
    published_counts: dict[str, tuple[int, int, int]]
    tree: str
    default_root: Callable[[], Path] | None = None


LAYOUTS = {
    "MVTec-AD": Layout(
        categories=lambda root: list(mvtec.CATEGORIES),
        train=mvtec.train_records,
        test=lambda root, item, allow: mvtec.test_records(root, item, truth_optional=False, allow_missing_masks=allow),
        published_counts=mvtec.PUBLISHED_COUNTS,
        tree=mvtec.TREE,
    ),
    "ELPV": Layout(
        categories=lambda root: list(elpv.CATEGORIES),
        train=elpv.train_records,
        test=lambda root, item, allow: elpv.test_records(root, item),
        published_counts={},
        tree=elpv.TREE,
        default_root=elpv.installed_root,
    ),
    "Folder": Layout(
        categories=mvtec.discover_categories,
        train=mvtec.train_records,
        test=lambda root, item, allow: mvtec.test_records(root, item, truth_optional=True, allow_missing_masks=allow),
        published_counts={},
        tree=mvtec.TREE,
    ),
}


def data_root(dataset: str, data_path: str | None) -> Path:
    """The existing folder of a data set; raises UserError with the expected content otherwise."""
    layout = LAYOUTS[dataset]
    if data_path is None:
        if layout.default_root is None:
            raise UserError(f"--dataset {dataset} needs --data_path, the folder that holds one folder per category")
        return layout.default_root()
    root = Path(data_path)
    if not root.is_dir():
        raise UserError(f"data not found: --data_path {data_path!r} is no folder; expected in it: {layout.tree}")
    return root


def choose_items(dataset: str, root: Path, wanted: list[str] | None) -> list[str]:
    """Categories to work on, in the data set's order; raises UserError for an unknown one."""
    known = LAYOUTS[dataset].categories(root)
    if RESERVED_ITEM in known:
        raise UserError(f"category {RESERVED_ITEM!r} in {str(root)!r}: rename it, the results use that name for their mean")
    if wanted is None:
        return known
    for item in wanted:
        if item not in known:
            near = difflib.get_close_matches(item, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"choose from {' '.join(known)}"
            raise UserError(f"--item {item!r} is no category of {dataset} in {str(root)!r}; {hint}")
    return [item for item in known if item in wanted]
