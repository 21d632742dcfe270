"""MVTec-LOCO: MVTec layout, but several masks per image, whose pixel value names the type of their defect.

`<item>/validation/good` is not trained on. `<item>/defects_config.json` says, per pixel value, how much of a defect has to be
found: a missing part may be anywhere in a large area, and marking a piece of that is enough.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.errors import UserError
from common.readers import read_json
from datasets.images import list_images, load_mask_values
from datasets.listing import DEFAULT_OPTIONS, ListingOptions, enumerated, index_source
from datasets.mvtec import Form, good_records
from datasets.records import DefectRegion, Record

KINDS = ("logical_anomalies", "structural_anomalies")
CONFIG = "defects_config.json"
TREE = (
    "<item>/train/good/*.png, <item>/test/<good or defect>/*.png, <item>/ground_truth/<defect>/<stem>/*.png, "
    f"<item>/{CONFIG}, <item>/validation/good/*.png (not trained on)"
)


def _masks_by_folder(folder: Path, images: list[Path], options: ListingOptions) -> dict[str, tuple[Path, ...]]:
    """All masks of `<stem>/` for every image; a folder without an image is a fault."""
    stems = {path.stem for path in images}
    folders = [path for path in sorted(folder.iterdir()) if path.is_dir() and not path.name.startswith(".")]
    surplus = [path.name for path in folders if path.name not in stems]
    if surplus:
        options.on_fault(
            f"mask without an image: {len(surplus)} folders in {str(folder)!r} belong to no image of their test folder: "
            f"{enumerated(surplus)}; name them like the image without its suffix, or remove them"
        )
    found = {path.name: tuple(list_images(path)) for path in folders if path.name in stems}
    return {stem: masks for stem, masks in found.items() if masks}


FORM = Form(find_masks=_masks_by_folder, tree=TREE)


def validation_records(root: Path, item: str, options: ListingOptions = DEFAULT_OPTIONS) -> list[Record]:
    """Good images of `<item>/validation/good`, which belong to neither training nor test."""
    return good_records(root / item / "validation" / FORM.good, item, FORM)


@dataclass(frozen=True)
class _Saturation:
    threshold: float
    relative: bool

    def pixels(self, area: int) -> float:
        """Pixels of a defect of this area from which on it counts as fully found."""
        return self.threshold * area if self.relative else min(self.threshold, area)


def _saturations(path: Path) -> dict[int, _Saturation]:
    """Saturation by pixel value; raises UserError if the file is absent or not as published."""
    content = read_json(index_source(path, "saturation of defects"), object)
    try:
        entries = {
            entry["pixel_value"]: _Saturation(entry["saturation_threshold"], entry["relative_saturation"]) for entry in content
        }
    except (TypeError, KeyError) as error:
        raise UserError(
            f"saturation of defects damaged: {str(path)!r} must be a list of objects with pixel_value, saturation_threshold "
            "and relative_saturation; download it again"
        ) from error
    for value, saturation in entries.items():
        numbers = isinstance(value, int) and isinstance(saturation.threshold, (int, float))
        numbers = numbers and isinstance(saturation.relative, bool)
        if not numbers or not 0 < saturation.threshold < math.inf or (saturation.relative and saturation.threshold > 1):
            raise UserError(
                f"saturation of defects damaged: {str(path)!r} has for pixel value {value!r} the threshold "
                f"{saturation.threshold!r}; expected pixels above 0, or a share up to 1 with relative_saturation; download it again"
            )
    return entries


def defect_regions(record: Record, max_pixels: int) -> list[DefectRegion]:
    """One region per mask file that marks anything; none for a good image.

    Raises:
        UserError: `defects_config.json` is absent, damaged or does not know a mask's pixel value, or a mask holds several.
    """
    if not record.masks:
        return []
    config = record.path.parents[2] / CONFIG
    saturations = _saturations(config)
    regions = []
    for path in record.masks:
        values = load_mask_values(path, max_pixels)
        present = np.unique(values[values > 0]).tolist()
        if len(present) > 1:
            raise UserError(f"mask of several defects: {str(path)!r} has the pixel values {present}; expected one per file")
        if not present:
            continue
        if present[0] not in saturations:
            raise UserError(
                f"unknown defect: {str(path)!r} has the pixel value {present[0]}, {str(config)!r} knows {sorted(saturations)}; "
                "download both again"
            )
        mask = values > 0
        regions.append(DefectRegion(mask, saturations[present[0]].pixels(int(mask.sum()))))
    return regions
