"""Draw photographs of buttons with small defects: a data set in MVTec layout for high resolutions, free of any licence.

python -m scripts.make_buttons --output datasets/buttons_1024
python -m scripts.make_buttons --output small --image_size 256 --classes 1 --train 16 --test_good 6 --test_defective 12
python VarAD.py --dataset Folder --data_path datasets/buttons_1024 --image_size 1024

The classes are plastic with four holes, mother-of-pearl with two, wood with four and metal with two. Results on these
pictures say what a method does with small defects at high resolution; they are not comparable with published ones.
The same command gives the same pictures with the same libraries, and no picture depends on how many others there are.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
from PIL import Image

from common.errors import UserError
from common.progress import ProgressBar
from datasets.button_defects import DEFECTS, with_defect
from datasets.buttons import KINDS, button
from utils.checkpoint import atomic_write
from utils.command import run_command
from utils.converters import number
from utils.loading import default_worker_count
from utils.parser import tool_parser

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Picture:
    """One file to write; a defective one has a mask beside it.

    Attributes:
        item: the class.
        index: number among the pictures of its part, which names it.
        entropy: what its random generator starts from.
    """

    folder: Path
    item: str
    index: int
    entropy: tuple[int, ...]
    defect: str | None = None

    @property
    def name(self) -> str:
        """Without the ending."""
        return f"{self.index:03d}"


def planned(output: Path, classes: int, counts: tuple[int, int, int], seed: int) -> list[Picture]:
    """All pictures of the data set; the defects take turns.

    Args:
        counts: of each class, for training, good ones of the test, defective ones.
    """
    defects = list(DEFECTS)
    pictures = []
    for class_index, item in enumerate(list(KINDS)[:classes]):
        for part, count in enumerate(counts):
            for index in range(count):
                defect = defects[index % len(defects)] if part == 2 else None
                folder = output / item / ("train", "test", "test")[part] / (defect or "good")
                pictures.append(Picture(folder, item, index, (seed, class_index, part, index), defect))
    return pictures


def save(path: Path, pixels: np.ndarray) -> None:
    """Write a PNG whole or not at all; ResourceError as `atomic_write`."""
    atomic_write(path, lambda file: Image.fromarray(pixels).save(file, "PNG"))


def draw(picture: Picture, side: int) -> None:
    """Draw one picture from a generator of its own, and write it and its mask."""
    generator, kind = np.random.default_rng(picture.entropy), KINDS[picture.item]
    if picture.defect is None:
        save(picture.folder / f"{picture.name}.png", button(generator, kind, side))
        return
    pixels, mask = with_defect(generator, kind, side, picture.defect)
    save(picture.folder / f"{picture.name}.png", pixels)
    truth = picture.folder.parents[1] / "ground_truth" / picture.defect
    save(truth / f"{picture.name}_mask.png", mask.astype(np.uint8) * 255)


def make(arguments: argparse.Namespace) -> int:
    """Draw the data set into a new or empty folder."""
    output = arguments.output
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise UserError(f"--output {str(output)!r} already holds something; give a new or an empty folder")
    counts = (arguments.train, arguments.test_good, arguments.test_defective)
    pictures = planned(output, arguments.classes, counts, arguments.seed)
    with ThreadPool(default_worker_count()) as threads:
        drawn = threads.imap_unordered(partial(draw, side=arguments.image_size), pictures)
        for _ in ProgressBar(drawn, total=len(pictures), desc="buttons", unit="image", disable=None):
            pass
    logger.info("%d pictures of %d classes: %s; read them with --dataset Folder", len(pictures), arguments.classes, output)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = tool_parser(__doc__)
    parser.add_argument("--output", type=Path, required=True, help="a new or an empty folder")
    parser.add_argument("--image_size", type=number(int, 64, 2048), default=1024, help="side in pixels; default: 1024")
    parser.add_argument("--classes", type=number(int, 1, len(KINDS)), default=len(KINDS), help="the first ones; default: all 4")
    for name, default, help_text in (
        ("train", 40, "good images for training, per class"),
        ("test_good", 20, "good images for the test, per class"),
        ("test_defective", 20, "defective images for the test, per class"),
    ):
        parser.add_argument(f"--{name}", type=number(int, 1), default=default, help=f"{help_text}; default: {default}")
    parser.add_argument("--seed", type=number(int, 0), default=1, help="default: 1")
    return run_command(parser, argv, make)


if __name__ == "__main__":
    sys.exit(main())
