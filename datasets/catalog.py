"""The data sets by the name that `--dataset` takes, and which of their categories a command works on."""

import difflib
import os
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError
from datasets.layouts import LAYOUTS, Layout
from datasets.listing import ListingOptions

__all__ = ["LAYOUTS", "RESERVED_ITEM", "DataSource", "Layout", "ListingOptions", "choose_items", "data_sources", "label_of"]

RESERVED_ITEM = "Mean"


@dataclass(frozen=True)
class DataSource:
    """A data set and where it lies."""

    dataset: str
    root: Path

    @property
    def layout(self) -> Layout:
        """How to list it."""
        return LAYOUTS[self.dataset]


def data_sources(dataset: str, paths: list[str] | None) -> list[DataSource]:
    """The data sets of `A+B+C` with one existing folder each.

    Raises:
        UserError: an unknown or repeated name, another number of folders than of names, a folder that does not exist.
    """
    names = dataset.split("+")
    for name in names:
        if name not in LAYOUTS:
            raise UserError(f"--dataset {dataset!r}: {name!r} is no data set; {_hint(name, list(LAYOUTS))}")
        if names.count(name) > 1:
            raise UserError(f"--dataset {dataset!r} names {name} twice; name each data set once")
    if paths is None and len(names) == 1:
        layout = LAYOUTS[dataset]
        if layout.default_root is None:
            raise UserError(f"--dataset {dataset} needs --data_path, the folder that holds one folder per category")
        return [DataSource(dataset, layout.default_root())]
    paths = paths or []
    if len(paths) != len(names):
        raise UserError(
            f"--dataset {dataset!r} needs {len(names)} folders after --data_path, one per data set in the same order; "
            f"found {len(paths)}"
        )
    for name, path in zip(names, paths, strict=True):
        if not os.path.isdir(path):
            raise UserError(f"data not found: --data_path {path!r} is no folder; expected in it: {LAYOUTS[name].tree}")
    return [DataSource(name, Path(path)) for name, path in zip(names, paths, strict=True)]


def choose_items(sources: list[DataSource], wanted: list[str] | None) -> list[tuple[DataSource, str]]:
    """Categories to work on, in the order of the data sets and of each one's categories.

    Args:
        wanted: `bottle` or `MVTec-AD/bottle`; None for all.

    Raises:
        UserError: an unknown category, or a plain name that several data sets have.
    """
    known = [(source, item) for source in sources for item in _categories(source)]
    if wanted is None:
        return known
    chosen = {_find(name, known, sources) for name in wanted}
    return [pair for pair in known if pair in chosen]


def label_of(sources: list[DataSource], source: DataSource, item: str) -> str:
    """Name of a category in results: `bottle`, or `MVTec-AD/bottle` among several data sets."""
    return item if len(sources) == 1 else _full_name(source, item)


def _full_name(source: DataSource, item: str) -> str:
    return f"{source.dataset}/{item}"


def _categories(source: DataSource) -> list[str]:
    known = source.layout.categories(source.root)
    if RESERVED_ITEM in known:
        raise UserError(
            f"category {RESERVED_ITEM!r} in {str(source.root)!r}: rename it, the results use that name for their mean"
        )
    return known


def _find(name: str, known: list[tuple[DataSource, str]], sources: list[DataSource]) -> tuple[DataSource, str]:
    matches = [(source, item) for source, item in known if name in (item, _full_name(source, item))]
    if len(matches) == 1:
        return matches[0]
    if matches:
        choices = " or ".join(_full_name(*match) for match in matches)
        raise UserError(f"--item {name!r} is a category of several data sets; write {choices}")
    names = [label_of(sources, source, item) for source, item in known]
    by_any_name = names if len(sources) == 1 else [item for _, item in known] + names
    where = " and ".join(f"{source.dataset} in {str(source.root)!r}" for source in sources)
    raise UserError(f"--item {name!r} is no category of {where}; {_hint(name, by_any_name)}")


def _hint(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"choose from {' '.join(known)}"
