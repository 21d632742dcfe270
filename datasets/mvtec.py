"""MVTec layout: `<item>/train/good`, `<item>/test/{good,<defect>}`, `<item>/ground_truth/<defect>/<stem>_mask.png`.

Serves all data sets of this shape; a `Form` says where one differs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from common.errors import UserError
from datasets.images import is_image_file, list_images
from datasets.listing import DEFAULT_OPTIONS, ListingOptions, enumerated, has_control_characters
from datasets.records import Record

TREE = "<item>/train/good/*.png, <item>/test/<good or defect>/*.png, <item>/ground_truth/<defect>/<stem>_mask.png"
MaskFinder = Callable[[Path, list[Path], ListingOptions], dict[str, tuple[Path, ...]]]


def discover_categories(root: Path) -> list[str]:
    """Names of the visible folders below `root` that hold a `train` folder, sorted.

    Raises:
        UserError: there is none, or a name has a backslash or control characters: categories name folders and lines of a log.
    """
    found = sorted(path.name for path in root.iterdir() if not path.name.startswith(".") and (path / "train").is_dir())
    if not found:
        raise UserError(f"no category in {str(root)!r}: expected {TREE}")
    for name in found:
        if "\\" in name or has_control_characters(name):  # a backslash separates folders on other systems
            raise UserError(
                f"category {name!r} in {str(root)!r}: rename it, a category must not contain a backslash or control characters"
            )
    return found


def masks_by_stem(folder: Path, images: list[Path], options: ListingOptions) -> dict[str, tuple[Path, ...]]:
    """Masks by the stem of their image; `<stem>_mask.png` and `<stem>.png` both count. A mask without an image is a fault."""
    stems = {path.stem for path in images}
    masks: dict[str, tuple[Path, ...]] = {}
    surplus = []
    for path in list_images(folder) if folder.is_dir() else []:
        stem = path.stem if path.stem in stems else path.stem.removesuffix("_mask")
        if stem not in stems:
            surplus.append(path.name)
        elif stem in masks:
            options.on_fault(f"two masks for one image: {str(masks[stem][0])!r} and {str(path)!r}; keep one")
        else:
            masks[stem] = (path,)
    if surplus:
        options.on_fault(
            f"mask without an image: {len(surplus)} files in {str(folder)!r} belong to no image of their test folder: "
            f"{enumerated(surplus)}; rename them to <stem>_mask.png of their image or remove them"
        )
    return masks


@dataclass(frozen=True)
class Form:
    """How a data set differs from MVTec-AD.

    Attributes:
        good: name of the folders of good images.
        truth_optional: no `test` folder gives no records, and without any `ground_truth` folder defective images simply
            have no pixel truth.
        find_masks: (`ground_truth/<defect>`, images, options) -> masks by stem of the image.
        tree: what lies below the root, for messages.
    """

    good: str = "good"
    truth_optional: bool = False
    find_masks: MaskFinder = masks_by_stem
    tree: str = TREE


MVTEC = Form()


def good_records(folder: Path, item: str, form: Form = MVTEC) -> list[Record]:
    """All images of `folder`, which are good; raises UserError if there are none."""
    if not folder.is_dir():
        raise UserError(
            f"no training images: {str(folder)!r} does not exist; expected {form.tree}; with only some categories at hand "
            "name them with --item"
        )
    images = list_images(folder)
    if not images:
        raise UserError(f"no training images: {str(folder)!r} holds no image file (png jpg jpeg bmp tif tiff webp)")
    return [Record(path, 0, item) for path in images]


def train_records(root: Path, item: str, options: ListingOptions = DEFAULT_OPTIONS, form: Form = MVTEC) -> list[Record]:
    """Good images of `<item>/train/good`; raises UserError if there are none."""
    return good_records(root / item / "train" / form.good, item, form)


def test_records(root: Path, item: str, options: ListingOptions = DEFAULT_OPTIONS, form: Form = MVTEC) -> list[Record]:
    """Images of all folders of `<item>/test`, in order of folder and name; masks are found by stem, never by position.

    Raises:
        UserError: no test folder, missing masks, masks without an image or two masks for one image.
    """
    folder = root / item / "test"
    if not folder.is_dir():
        if form.truth_optional:
            return []
        raise UserError(f"no test images: {str(folder)!r} does not exist; expected {form.tree}")
    records: list[Record] = []
    for kind in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")):
        if kind.name == form.good:
            records += [Record(path, 0, item) for path in list_images(kind)]
        else:
            records += _defective_records(kind, root / item / "ground_truth", item, options, form)
    if not records:
        raise UserError(f"no test images: {str(folder)!r} holds no folder with images; expected {form.tree}")
    return records


def _defective_records(kind: Path, truth: Path, item: str, options: ListingOptions, form: Form) -> list[Record]:
    images = list_images(kind)
    stems = [path.stem for path in images]
    masks: dict[str, tuple[Path, ...]] = {}
    if (truth / kind.name).is_dir():
        twins = sorted(path.name for path in images if stems.count(path.stem) > 1) if len(set(stems)) < len(stems) else []
        if twins:
            options.on_fault(f"images share one stem in {str(kind)!r}: {enumerated(twins)}; rename them, as masks go by stem")
        masks = form.find_masks(truth / kind.name, images, options)
    missing = [path.name for path in images if path.stem not in masks]
    if missing and not options.allow_missing_masks and not (form.truth_optional and not truth.is_dir()):
        options.on_fault(
            f"{len(missing)} defective images in {str(kind)!r} have no mask in {str(truth / kind.name)!r}: "
            f"{enumerated(missing)}; add them (expected {form.tree}) or give --allow_missing_masks (pixel metrics on the rest)"
        )
    return [Record(path, 1, item, masks.get(path.stem, ()), kind.name) for path in images]


def stray_masks(root: Path, item: str, options: ListingOptions = DEFAULT_OPTIONS, form: Form = MVTEC) -> list[Path]:
    """What of `ground_truth` is never read: files in no folder, folders of good images or of no test folder."""
    truth, test = root / item / "ground_truth", root / item / "test"
    if not truth.is_dir():
        return []
    read = {path.name for path in test.iterdir() if path.is_dir() and path.name != form.good} if test.is_dir() else set()
    return sorted(path for path in truth.iterdir() if path.name not in read and (path.is_dir() or is_image_file(path)))
