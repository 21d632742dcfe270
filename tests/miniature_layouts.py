"""Miniature trees of the public data sets, with what real ones hold: odd file types and names, 16 bits, faint masks, litter.

Every category has TRAIN good images to train on, GOOD good and DEFECTIVE defective test images.
"""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.miniature import SIDE, save, texture, with_defect

TRAIN, GOOD, DEFECTIVE = 6, 3, 4
CONFIG = [  # of MVTec-LOCO
    {"defect_name": "missing", "pixel_value": 255, "saturation_threshold": 40, "relative_saturation": False},
    {"defect_name": "stain", "pixel_value": 254, "saturation_threshold": 0.5, "relative_saturation": True},
]


def litter(folder: Path) -> None:
    """Files that are no images although some are named like one."""
    for name in ("._000.png", "Thumbs.db", ".DS_Store", "notes.txt"):
        (folder / name).write_text("no image")


def good_images(folder: Path, count: int, generator: np.random.Generator, suffix: str = ".png") -> list[Path]:
    """`000.png` and so on; the second one is a 16-bit grey image where the file type allows it."""
    paths = []
    for index in range(count):
        pixels = texture(generator)
        if index == 1 and suffix == ".png":
            pixels = pixels[..., 0].astype(np.uint16) * 257
        paths.append(save(folder / f"{index:03d}{suffix}", pixels))
    litter(folder)
    return paths


def make_visa(root: Path, items=("candle",)) -> Path:
    """VisA_pytorch, the prepared one-class split below `1cls`; masks of value 1."""
    generator = np.random.default_rng(0)
    for item in items:
        folder = root / "1cls" / item
        good_images(folder / "train" / "good", TRAIN, generator, ".JPG")
        good_images(folder / "test" / "good", GOOD, generator, ".JPG")
        for index in range(DEFECTIVE):
            image, mask = with_defect(generator)
            save(folder / "test" / "bad" / f"{index:03d}.JPG", image)
            save(folder / "ground_truth" / "bad" / f"{index:03d}.png", mask // 255)
        litter(folder / "ground_truth" / "bad")
    return root


def make_visa_downloaded(root: Path, items=("candle", "pcb1")) -> Path:
    """VisA as unpacked: one folder of normal images, whose split is in a csv; masks of value 3."""
    generator = np.random.default_rng(0)
    lines = [("object", "split", "label", "image", "mask")]
    for item in items:
        images = root / item / "Data" / "Images"
        for index, path in enumerate(good_images(images / "Normal", TRAIN + GOOD, generator, ".JPG")):
            part = "test" if index % 3 == 0 else "train"  # mixed, unlike the folders of the prepared split
            lines.append((item, part, "normal", path.relative_to(root).as_posix(), ""))
        for index in range(DEFECTIVE):
            image, mask = with_defect(generator)
            path = save(images / "Anomaly" / f"{index:03d}.JPG", image)
            truth = save(root / item / "Data" / "Masks" / "Anomaly" / f"{index:03d}.png", mask // 85)
            lines.append((item, "test", "anomaly", path.relative_to(root).as_posix(), truth.relative_to(root).as_posix()))
        litter(images / "Anomaly")
    write_visa_split(root, lines)
    return root


def write_visa_split(root: Path, lines: list[tuple[str, ...]]) -> None:
    """`split_csv/1cls.csv`, with the line ends of the published one."""
    (root / "split_csv").mkdir(parents=True, exist_ok=True)
    with (root / "split_csv" / "1cls.csv").open("w", newline="") as file:
        csv.writer(file).writerows(lines)


def make_realiad(root: Path, items=("audiojack",)) -> Path:
    """Real-IAD: nested json folder, two kinds of defects, several views per part; masks of value 128 beside their images."""
    generator = np.random.default_rng(0)
    for item in items:
        folder = root / "realiad_1024" / item
        good = []
        for index in range(TRAIN + GOOD):
            name = f"OK/S{index // 3:04d}/{item}_{index // 3:04d}_OK_C{index % 3 + 1}_20231021.jpg"
            save(folder / name, texture(generator))
            good.append(realiad_record("OK", name))
        defective = []
        for index in range(DEFECTIVE):
            kind = ("HS", "ZW")[index % 2]
            name = f"NG/{kind}/S{index:04d}/{item}_{index:04d}_NG_{kind}_C1_20231021"
            image, mask = with_defect(generator)
            save(folder / f"{name}.jpg", image)
            save(folder / f"{name}.png", mask // 255 * 128)
            defective.append(realiad_record(kind, f"{name}.jpg", f"{name}.png"))
        litter(folder / "OK" / "S0000")
        write_realiad_index(root, item, good[:TRAIN], good[TRAIN:] + defective)
    return root


def realiad_record(kind: str, image: str, mask: str | None = None) -> dict:
    """A record as the data set writes it."""
    return {"category": "part", "anomaly_class": kind, "image_path": image, "mask_path": mask}


def write_realiad_index(root: Path, item: str, train: list, test: list, folder: str = "realiad_jsons/realiad_jsons") -> Path:
    """`<item>.json` of one json folder."""
    path = root / folder / f"{item}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    meta = {"normal_class": "OK", "prefix": f"{item}/"}
    path.write_text(json.dumps({"meta": meta, "train": train, "test": test}))
    return path


def corner() -> np.ndarray:
    """Mask of 64 pixels of value 254, away from where squares are drawn."""
    mask = np.zeros((SIDE, SIDE), np.uint8)
    mask[:8, :8] = 254
    return mask


def make_loco(root: Path, items=("breakfast_box",)) -> Path:
    """MVTec-LOCO: two masks for every second defective image, of two defect types; validation images; saturation of both."""
    generator = np.random.default_rng(0)
    for item in items:
        folder = root / item
        good_images(folder / "train" / "good", TRAIN, generator)
        good_images(folder / "validation" / "good", 2, generator)
        good_images(folder / "test" / "good", GOOD, generator)
        for kind in ("logical_anomalies", "structural_anomalies"):
            for index in range(DEFECTIVE // 2):
                image, mask = with_defect(generator)
                save(folder / "test" / kind / f"{index:03d}.png", image)
                truth = folder / "ground_truth" / kind / f"{index:03d}"
                save(truth / "000.png", mask)
                if index % 2:
                    save(truth / "001.png", corner())
                litter(truth)
        (folder / "defects_config.json").write_text(json.dumps(CONFIG))
    return root


def make_btad(root: Path, items=("01", "03")) -> Path:
    """BTAD: bmp and png mixed, masks by stem in either type and any letter case."""
    generator = np.random.default_rng(0)
    for item in items:
        folder = root / item
        good_images(folder / "train" / "ok", TRAIN, generator, ".bmp")
        good_images(folder / "test" / "ok", GOOD, generator, ".png")
        for index in range(DEFECTIVE):
            image, mask = with_defect(generator)
            save(folder / "test" / "ko" / f"{index:04d}{('.bmp', '.png')[index % 2]}", image)
            save(folder / "ground_truth" / "ko" / f"{index:04d}{('.png', '.BMP')[index % 2]}", mask)
        litter(folder / "test" / "ko")
    return root


def make_dtd(root: Path, items=("Woven_001",)) -> Path:
    """DTD-Synthetic: MVTec layout; colour masks."""
    return _mvtec_like(root, items, kinds=("bad",), paint=lambda mask: np.stack([mask, mask * 0, mask * 0], axis=2))


def make_mpdd(root: Path, items=("bracket_black",)) -> Path:
    """MPDD: MVTec layout, two kinds of defects; names with spaces and letters beyond ASCII, bits as masks."""
    names = [f"Teil {index} \N{GREEK SMALL LETTER ALPHA}'.png" for index in range(DEFECTIVE)]
    return _mvtec_like(root, items, kinds=("hole", "scratches"), paint=lambda mask: mask > 0, names=names)


def _mvtec_like(root: Path, items, kinds, paint, names=None) -> Path:
    generator = np.random.default_rng(0)
    names = names or [f"{index:03d}.png" for index in range(DEFECTIVE)]
    for item in items:
        folder = root / item
        good_images(folder / "train" / "good", TRAIN, generator)
        good_images(folder / "test" / "good", GOOD, generator)
        for index, name in enumerate(names):
            kind = kinds[index % len(kinds)]
            image, mask = with_defect(generator)
            path = save(folder / "test" / kind / name, image)
            truth = folder / "ground_truth" / kind / f"{path.stem}_mask.png"
            truth.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(paint(mask)).save(truth)
    return root


# (data set, generator, category, number of images of each kind of defect)
TREES = [
    ("VisA", make_visa, "candle", {"bad": 4}),
    ("VisA", make_visa_downloaded, "pcb1", {"anomaly": 4}),
    ("Real-IAD", make_realiad, "audiojack", {"HS": 2, "ZW": 2}),
    ("MVTec-LOCO", make_loco, "breakfast_box", {"logical_anomalies": 2, "structural_anomalies": 2}),
    ("BTAD", make_btad, "03", {"ko": 4}),
    ("DTD-Synthetic", make_dtd, "Woven_001", {"bad": 4}),
    ("MPDD", make_mpdd, "bracket_black", {"hole": 2, "scratches": 2}),
]
each_tree = pytest.mark.parametrize(("dataset", "make", "item", "kinds"), TREES, ids=[make.__name__ for _, make, *_ in TREES])
