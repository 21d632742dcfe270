"""MVTec layout: `<item>/train/good`, `<item>/test/{good,<defect>}`, `<item>/ground_truth/<defect>/<stem>_mask.png`.

Serves MVTec-AD and Folder (a user's own photographs, where masks and defective images are optional).
"""

from pathlib import Path

from common.errors import UserError
from datasets.images import list_images
from datasets.records import Record

CATEGORIES = (
    "carpet grid leather tile wood bottle cable capsule hazelnut metal_nut pill screw toothbrush transistor zipper".split()
)
# item: (train, test good, test defective)
PUBLISHED_COUNTS = {
    "carpet": (280, 28, 89),
    "grid": (264, 21, 57),
    "leather": (245, 32, 92),
    "tile": (230, 33, 84),
    "wood": (247, 19, 60),
    "bottle": (209, 20, 63),
    "cable": (224, 58, 92),
    "capsule": (219, 23, 109),
    "hazelnut": (391, 40, 70),
    "metal_nut": (220, 22, 93),
    "pill": (267, 26, 141),
    "screw": (320, 41, 119),
    "toothbrush": (60, 12, 30),
    "transistor": (213, 60, 40),
    "zipper": (240, 32, 119),
}
GOOD = "good"
_LISTED = 10
TREE = "<item>/train/good/*.png, <item>/test/<good or defect>/*.png, <item>/ground_truth/<defect>/<stem>_mask.png"


def discover_categories(root: Path) -> list[str]:
    """Names of the folders below `root` that hold a `train` folder, sorted."""
    found = sorted(folder.name for folder in root.iterdir() if (folder / "train").is_dir())
    if not found:
        raise UserError(f"no category in {str(root)!r}: expected {TREE}")
    return found


def train_records(root: Path, item: str) -> list[Record]:
    """Good images of `<item>/train/good`; raises UserError if there are none."""
    folder = root / item / "train" / GOOD
    if not folder.is_dir():
        raise UserError(
            f"no training images: {str(folder)!r} does not exist; expected {TREE}; with only some categories at hand name "
            "them with --item"
        )
    images = list_images(folder)
    if not images:
        raise UserError(f"no training images: {str(folder)!r} holds no image file (png jpg jpeg bmp tif tiff webp)")
    return [Record(path, 0, item) for path in images]


def test_records(root: Path, item: str, truth_optional: bool, allow_missing_masks: bool) -> list[Record]:
    """Images of all folders of `<item>/test`, in order of folder and name; masks are found by stem, never by position.

    Args:
        truth_optional: no `test` folder gives no records, and without any `ground_truth` folder defective images simply
            have no pixel truth.
        allow_missing_masks: single missing masks are accepted too.

    Raises:
        UserError: no test folder, missing masks, masks without an image or two masks for one image.
    """
    folder = root / item / "test"
    if not folder.is_dir():
        if truth_optional:
            return []
        raise UserError(f"no test images: {str(folder)!r} does not exist; expected {TREE}")
    truth = root / item / "ground_truth"
    demand_masks = not allow_missing_masks and not (truth_optional and not truth.is_dir())
    records: list[Record] = []
    for kind in sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")):
        images = list_images(kind)
        if kind.name == GOOD:
            records += [Record(path, 0, item) for path in images]
            continue
        masks = _masks_by_stem(truth / kind.name, images)
        missing = [path.name for path in images if path.stem not in masks]
        if missing and demand_masks:
            raise UserError(
                f"{len(missing)} defective images in {str(kind)!r} have no mask {str(truth / kind.name)}/<stem>_mask.png: "
                f"{', '.join(missing[:_LISTED])}{' ...' if len(missing) > _LISTED else ''}; add them or give "
                "--allow_missing_masks (pixel metrics on the rest)"
            )
        records += [Record(path, 1, item, (masks[path.stem],) if path.stem in masks else ()) for path in images]
    if not records:
        raise UserError(f"no test images: {str(folder)!r} holds no folder with images; expected {TREE}")
    return records


def _masks_by_stem(folder: Path, images: list[Path]) -> dict[str, Path]:
    """Masks by the stem of their image; `<stem>_mask.png` and `<stem>.png` both count, a mask without an image does not pass."""
    if not folder.is_dir():
        return {}
    stems = {path.stem for path in images}
    if len(stems) < len(images):
        twins = sorted(path.name for path in images if [other.stem for other in images].count(path.stem) > 1)
        raise UserError(f"two images share one stem in {str(images[0].parent)!r}: {twins[:4]}; rename one, as masks go by stem")
    masks: dict[str, Path] = {}
    for path in list_images(folder):
        stem = path.stem if path.stem in stems else path.stem.removesuffix("_mask")
        if stem not in stems:
            raise UserError(
                f"mask without an image: {str(path)!r} belongs to no image of its test folder; "
                "rename it to <stem>_mask.png of its image or remove it"
            )
        if stem in masks:
            raise UserError(f"two masks for one image: {str(masks[stem])!r} and {str(path)!r}; keep one")
        masks[stem] = path
    return masks
