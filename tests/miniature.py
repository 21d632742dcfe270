"""Miniature data sets in the real folder layouts, for tests."""

from pathlib import Path

import numpy as np
from PIL import Image

SIDE = 64
TINY_FLAGS = ["--encoder", "random_vit_tiny_14", "--input_size", "64", "--crop_size", "56", "--batch_size", "4"]
TINY_FLAGS += ["--num_workers", "0", "--device", "cpu"]


def texture(generator: np.random.Generator, side: int = SIDE) -> np.ndarray:
    """A photograph-like good image: soft stripes with noise, (side, side, 3) uint8."""
    rows = np.linspace(0, 6 * np.pi, side)
    stripes = 128 + 40 * np.sin(rows + generator.uniform(0, 0.5))[:, None, None]
    return np.clip(stripes + generator.normal(0, 6, (side, side, 3)), 0, 255).astype(np.uint8)


def save(path: Path, pixels: np.ndarray, **options) -> Path:
    """Write an image, with its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def with_defect(generator: np.random.Generator, side: int = SIDE) -> tuple[np.ndarray, np.ndarray]:
    """A texture with a bright square, and its mask (side, side) uint8 of 0 and 255."""
    image, mask = texture(generator, side), np.zeros((side, side), np.uint8)
    top, left = generator.integers(side // 4, side // 2, 2)
    square = slice(top, top + side // 5), slice(left, left + side // 5)
    image[square], mask[square] = (250, 30, 30), 255
    return image, mask


def make_mvtec(root: Path, items=("bottle",), train=8, good=3, defective=3, masks=True, side=SIDE) -> Path:
    """MVTec layout: every defective image has a bright square, which its mask marks."""
    generator = np.random.default_rng(0)
    for item in items:
        for index in range(train):
            save(root / item / "train" / "good" / f"{index:03d}.png", texture(generator, side))
        for index in range(good):
            save(root / item / "test" / "good" / f"{index:03d}.png", texture(generator, side))
        for index in range(defective):
            image, mask = with_defect(generator, side)
            save(root / item / "test" / "hole" / f"{index:03d}.png", image)
            if masks:
                save(root / item / "ground_truth" / "hole" / f"{index:03d}_mask.png", mask)
    return root


def make_elpv(root: Path, count: int = 40) -> Path:
    """ELPV layout: labels.csv and images/, mono cells only; every fourth defective, every fifth doubtful."""
    generator = np.random.default_rng(0)
    lines = []
    for index in range(count):
        probability = "1.0" if index % 4 == 0 else "0.3333333333333333" if index % 5 == 0 else "0.0"
        name = f"images/cell{index:04d}.png"
        save(root / name, texture(generator)[..., 0])
        lines.append(f"{name}  {probability}                 mono")
    (root / "labels.csv").write_text("\n".join(lines) + "\n")
    return root
