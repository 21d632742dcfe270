"""MVTec-LOCO: what is trained on, several masks per image, and how much of a defect has to be found."""

import json

import numpy as np
import pytest

from common.errors import UserError
from datasets import mvtec_loco
from datasets.catalog import LAYOUTS, ListingOptions
from datasets.images import DEFAULT_MAX_PIXELS
from tests.miniature import SIDE, save
from tests.miniature_layouts import CONFIG, GOOD, TRAIN, make_loco

ITEM = "breakfast_box"


def records(root, part="test"):
    return getattr(LAYOUTS["MVTec-LOCO"], part)(root, ITEM, ListingOptions())


def names(records):
    return [f"{record.path.parent.parent.name}/{record.path.parent.name}/{record.path.name}" for record in records]


def test_loco_ignores_validation_and_unites_masks(tmp_path):
    root = make_loco(tmp_path)
    assert names(records(root, "train")) == [f"train/good/00{index}.png" for index in range(TRAIN)]
    assert names(records(root)) == [
        *(f"test/good/00{index}.png" for index in range(GOOD)),
        *(f"test/{kind}/00{index}.png" for kind in ("logical_anomalies", "structural_anomalies") for index in range(2)),
    ]
    assert [len(record.masks) for record in records(root)] == [0] * GOOD + [1, 2, 1, 2]
    assert names(records(root, "validation")) == ["validation/good/000.png", "validation/good/001.png"]
    (root / ITEM / "ground_truth" / "logical_anomalies" / "007").mkdir()
    with pytest.raises(UserError, match=r"1 folders in .*logical_anomalies' belong to no image .*'007'"):
        records(root)


def test_loco_regions_have_their_saturation(tmp_path):
    root = make_loco(tmp_path)
    good, *_, one, two = records(root)
    assert mvtec_loco.defect_regions(good, DEFAULT_MAX_PIXELS) == []
    ((square),) = mvtec_loco.defect_regions(one, DEFAULT_MAX_PIXELS)
    assert (square.mask.dtype, square.mask.shape, square.mask.sum()) == (bool, (SIDE, SIDE), 144)
    assert square.saturation == 40
    square, corner = mvtec_loco.defect_regions(two, DEFAULT_MAX_PIXELS)
    assert (square.saturation, corner.saturation, corner.mask.sum()) == (40, 32, 64)
    assert corner.mask[:8, :8].all()
    save(one.masks[0], np.pad(np.full((3, 3), 255, np.uint8), ((0, SIDE - 3), (0, SIDE - 3))))
    assert mvtec_loco.defect_regions(one, DEFAULT_MAX_PIXELS)[0].saturation == 9  # never more than the whole defect
    save(one.masks[0], np.zeros((SIDE, SIDE), np.uint8))
    assert mvtec_loco.defect_regions(one, DEFAULT_MAX_PIXELS) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"not found: .*defects_config\.json"),
        ("no json", "is no JSON"),
        ('{"a": 1}', "must be a list of objects"),
        ("7", "must be a list of objects"),
        (json.dumps([{**CONFIG[0], "pixel_value": []}]), "must be a list of objects"),
        (json.dumps([{"pixel_value": 255, "relative_saturation": True}]), "must be a list of objects"),
        (json.dumps([{**CONFIG[0], "saturation_threshold": "40"}]), "has for pixel value 255 the threshold '40'"),
        (json.dumps([{**CONFIG[0], "saturation_threshold": 0}]), "expected pixels above 0"),
        (json.dumps([{**CONFIG[0], "saturation_threshold": float("nan")}]), "NaN is no number"),
        (json.dumps([{**CONFIG[1], "saturation_threshold": 1.5}]), "or a share up to 1"),
        (json.dumps([{**CONFIG[0], "relative_saturation": 1}]), "threshold 40"),
        (json.dumps(CONFIG[1:]), r"pixel value 255, .* knows \[254\]"),
    ],
)
def test_loco_config_must_know_every_defect(tmp_path, content, message):
    root = make_loco(tmp_path)
    path = root / ITEM / "defects_config.json"
    path.unlink()
    if content is not None:
        path.write_text(content)
    record = records(root)[-1]
    with pytest.raises(UserError, match=message):
        mvtec_loco.defect_regions(record, DEFAULT_MAX_PIXELS)


def test_loco_mask_of_two_defects(tmp_path):
    record = records(make_loco(tmp_path))[-1]
    values = np.zeros((SIDE, SIDE), np.uint8)
    values[0], values[1] = 254, 255
    save(record.masks[0], values)
    with pytest.raises(UserError, match=r"several defects: .*\[254, 255\]"):
        mvtec_loco.defect_regions(record, DEFAULT_MAX_PIXELS)
