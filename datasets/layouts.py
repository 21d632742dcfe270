"""How to list each data set: one entry per name that `--dataset` takes."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from datasets import elpv, mvtec, mvtec_loco, published, realiad, visa
from datasets.listing import ListingOptions
from datasets.records import DefectRegion, Record

Lister = Callable[[Path, str, ListingOptions], list[Record]]


@dataclass(frozen=True)
class Layout:
    """How to list a data set: its categories, then the records of one category.

    Attributes:
        categories: root -> names in the published order.
        train: (root, item, options) -> records.
        test: (root, item, options) -> records.
        tree: what lies below the root, for messages.
        published_counts: item -> (train, test good, test defective), where published.
        published_total: the same of all categories, where published.
        published_items: categories; None if they are discovered in the folder.
        default_root: where the data set is when `--data_path` is not given.
        split_kinds: kinds of defects with image metrics of their own.
        defect_regions: (record, max_pixels) -> regions with saturation, for data sets that have it.
        validation: images of neither training nor test; held out where a training holds images out.
        published_validation: item -> number of these.
        stray_masks: files and folders of masks that belong to no test image and do not stop a listing.
    """

    categories: Callable[[Path], list[str]]
    train: Lister
    test: Lister
    tree: str
    published_counts: dict[str, published.Counts]
    published_total: published.Counts | None
    published_items: tuple[str, ...] | None
    default_root: Callable[[], Path] | None = None
    split_kinds: tuple[str, ...] = ()
    defect_regions: Callable[[Record, int], list[DefectRegion]] | None = None
    validation: Lister | None = None
    published_validation: dict[str, int] | None = None
    stray_masks: Callable[[Path, str, ListingOptions], list[Path]] | None = None


def _public(names, total: published.Counts | None, **parts) -> Layout:
    """A data set with known categories; `names` may carry their counts."""
    items = tuple(names)
    counts = names if isinstance(names, dict) else {}
    return Layout(
        categories=lambda root: list(items),
        published_counts=counts,
        published_total=total,
        published_items=items,
        **parts,
    )


def _module(module) -> dict:
    """Parts of a layout that has its own file."""
    parts = {"train": module.train_records, "test": module.test_records, "tree": module.TREE}
    return {**parts, "stray_masks": module.stray_masks} if hasattr(module, "stray_masks") else parts


def _folders(form: mvtec.Form) -> dict:
    """Parts of a layout that is MVTec's but for its form."""
    return {
        "train": partial(mvtec.train_records, form=form),
        "test": partial(mvtec.test_records, form=form),
        "stray_masks": partial(mvtec.stray_masks, form=form),
        "tree": form.tree,
    }


BTAD_FORM = mvtec.Form(
    good="ok", tree="{01,02,03}/train/ok/*.bmp, {01,02,03}/test/{ok,ko}/*.bmp, {01,02,03}/ground_truth/ko/<stem>.png"
)

LAYOUTS = {
    "MVTec-AD": _public(published.MVTEC_AD, published.MVTEC_AD_TOTAL, **_folders(mvtec.MVTEC)),
    "VisA": _public(published.VISA, published.VISA_TOTAL, **_module(visa)),
    "Real-IAD": _public(published.REAL_IAD, published.REAL_IAD_TOTAL, **_module(realiad)),
    "MVTec-LOCO": _public(
        published.MVTEC_LOCO,
        published.MVTEC_LOCO_TOTAL,
        **_folders(mvtec_loco.FORM),
        split_kinds=mvtec_loco.KINDS,
        defect_regions=mvtec_loco.defect_regions,
        validation=mvtec_loco.validation_records,
        published_validation=published.MVTEC_LOCO_VALIDATION,
    ),
    "BTAD": _public(published.BTAD, published.BTAD_TOTAL, **_folders(BTAD_FORM)),
    "DTD-Synthetic": _public(published.DTD_SYNTHETIC, published.DTD_SYNTHETIC_TOTAL, **_folders(mvtec.MVTEC)),
    "MPDD": _public(published.MPDD, published.MPDD_TOTAL, **_folders(mvtec.MVTEC)),
    "ELPV": _public(elpv.CATEGORIES, None, **_module(elpv), default_root=elpv.installed_root),
    "Folder": Layout(
        categories=mvtec.discover_categories,
        published_counts={},
        published_total=None,
        published_items=None,
        **_folders(mvtec.Form(truth_optional=True)),
    ),
}
