"""Judge photographs with a finished model: a verdict, a score and a heat map for each.

python -m scripts.predict --model bottle.binaryad --input photos/ --output out/
python -m scripts.predict --model bottle.binaryad --input monday/ tuesday/ one.png more.txt --output out/ --threshold 0.31

Below --output: predictions.csv with path, score, verdict (OK or NG), threshold and error of every image; heatmaps/<image>.jpg,
the photograph at its own size below a strip with the verdict, coloured where it is unusual, outlined where it is very unusual,
darker where the model does not look. An image that cannot be read is recorded, the others go on, and the exit code is 1.
"""

import argparse
import json
import logging
import math
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from binarize.kernels.engine import describe_path
from common.errors import ResourceError, UserError
from common.progress import ProgressBar
from datasets.images import DEFAULT_MAX_PIXELS
from utils.checkpoint import atomic_write, explain_write_error, write_text
from utils.command import run_command
from utils.converters import number
from utils.devices import choose_device
from utils.hosts import HOSTS
from utils.parser import tool_parser
from utils.pictures import heat_overlay, sixteen_bit_map, sixteen_bit_range, with_verdict, write_picture
from utils.prediction import Prediction, Predictor, find_images, rgb_photo
from utils.result_files import PredictionTable
from utils.run_lock import run_lock

logger = logging.getLogger(__name__)

_LONGEST_JPEG_SIDE = 65500


class ResultFolder:
    """What a run leaves below `--output`, and how long each part of the work took."""

    def __init__(self, folder: Path, predictor: Predictor, pictures: str, maps: str):
        self.folder, self.predictor, self.pictures, self.maps = folder, predictor, pictures, maps
        with _write_errors_of(folder):
            folder.mkdir(parents=True, exist_ok=True)
        self.table = PredictionTable(folder / "predictions.csv", predictor.threshold)
        if maps == "png16":
            write_text(folder / "maps" / "scale.json", json.dumps(_scale_of_maps(predictor.calibration), indent=1) + "\n")

    def add(self, name: Path, photo: Image.Image, prediction: Prediction) -> None:
        """Write one image's picture and map, then its row."""
        self._remove_old(name)
        if self.pictures == "all" or (self.pictures == "anomalous" and prediction.is_anomalous):
            self._write_picture(name, photo, prediction)
        if self.maps == "npy":
            atomic_write(self._path("maps", name, ".npy"), lambda file: np.save(file, prediction.map))
        elif self.maps == "png16":
            levels = Image.fromarray(sixteen_bit_map(prediction.map, self.predictor.calibration))
            write_picture(self._path("maps", name, ".png"), levels, "PNG", compress_level=3)
        self.table.add(str(prediction.path), prediction.score, prediction.verdict)

    def add_unreadable(self, path: Path, name: Path, reason: str) -> None:
        """Record an image that could not be read."""
        self._remove_old(name)
        self.table.add(str(path), error=reason)

    def _write_picture(self, name: Path, photo: Image.Image, prediction: Prediction) -> None:
        overlay = heat_overlay(np.asarray(photo), prediction.map, self.predictor.calibration)
        caption = f"score {prediction.score:.4f}   threshold {self.predictor.threshold:.4f}"
        picture = with_verdict(overlay, prediction.is_anomalous, caption)
        if max(picture.size) <= _LONGEST_JPEG_SIDE:
            write_picture(self._path("heatmaps", name, ".jpg"), picture, "JPEG", quality=90)
        else:
            write_picture(self._path("heatmaps", name, ".png"), picture, "PNG")

    def _path(self, kind: str, name: Path, suffix: str) -> Path:
        return self.folder / kind / name.with_name(name.name + suffix)

    def _remove_old(self, name: Path) -> None:
        """A picture of an earlier run would contradict the new table."""
        for kind, suffix in (("heatmaps", ".jpg"), ("heatmaps", ".png"), ("maps", ".npy"), ("maps", ".png")):
            path = self._path(kind, name, suffix)
            with _write_errors_of(path):
                path.unlink(missing_ok=True)


@contextmanager
def _write_errors_of(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ResourceError(explain_write_error(path, error)) from error


def _scale_of_maps(calibration: dict[str, float]) -> dict[str, float | str]:
    low, high = sixteen_bit_range(calibration)
    formula = "value 0: not inspected; value v from 1 to 65535: score = low + (v - 1) * (high - low) / 65534, clipped"
    return {"low": low, "high": high, "formula": formula}


class Judging:
    """The work on batches of images, with counts and times."""

    def __init__(self, predictor: Predictor, results: ResultFolder, max_pixels: int):
        self.predictor, self.results, self.max_pixels = predictor, results, max_pixels
        self.counts: Counter[str] = Counter()
        self.seconds = dict.fromkeys(("reading and preprocessing", "model", "writing"), 0.0)

    def judge(self, batch: list[tuple[Path, Path]]) -> None:
        """Read, judge and write some (image, relative path of its results); unreadable ones are only recorded."""
        photos, reasons = {}, {}
        with self._timed("reading and preprocessing"):
            for path, _ in batch:
                try:
                    photos[path] = rgb_photo(path, self.max_pixels)
                except UserError as error:
                    logger.warning("%s", error)
                    reasons[path] = str(error)
            inputs = [self.predictor.preprocess(photo) for photo in photos.values()]
        with self._timed("model"):
            sizes = [photo.size for photo in photos.values()]
            predictions = dict(zip(photos, self.predictor.judge(inputs, sizes, list(photos)), strict=True))
        with self._timed("writing"):
            for path, name in batch:
                if path in reasons:
                    self.results.add_unreadable(path, name, reasons[path])
                    self.counts["unreadable"] += 1
                else:
                    self.results.add(name, photos[path], predictions[path])
                    self.counts[predictions[path].verdict] += 1

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[part] += time.perf_counter() - start

    def summary(self) -> str:
        """Counts and seconds per image."""
        done, total = self.counts.total(), sum(self.seconds.values())
        parts = ", ".join(f"{part} {seconds / done:.3f}" for part, seconds in self.seconds.items())
        counts = f"{self.counts['OK']} OK, {self.counts['NG']} NG, {self.counts['unreadable']} unreadable"
        return f"{done} images: {counts}\n{total / done:.3f} s per image: {parts}"


def predict(arguments: argparse.Namespace) -> int:
    """Judge all images; exit code 1 if any could not be read."""
    with run_lock(arguments.output, "--output"):
        return _judge_all(arguments)


def _judge_all(arguments: argparse.Namespace) -> int:
    images = list(find_images(arguments.input, arguments.output).items())
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    predictor = Predictor.load(arguments.model, choose_device(arguments.device), arguments.encoder_weights)
    source = f"of the model file: {predictor.metadata['decision']['source']}"
    if arguments.threshold is not None:
        predictor.threshold, source = arguments.threshold, "of --threshold"
    if HOSTS[predictor.metadata["host"]].binarizes:
        logger.info("binary layers run on: %s", describe_path())
    results = ResultFolder(arguments.output, predictor, arguments.pictures, arguments.maps)
    judging = Judging(predictor, results, arguments.max_pixels)
    try:
        with ProgressBar(total=len(images), desc="judging", unit="image", disable=arguments.quiet or None) as bar:
            for start in range(0, len(images), arguments.batch_size):
                batch = images[start : start + arguments.batch_size]
                judging.judge(batch)
                bar.update(len(batch))
    finally:
        results.table.write()
        if judging.counts.total() < len(images):
            logger.warning(
                "stopped after %d of %d images; %s has them", judging.counts.total(), len(images), results.table.path
            )
    print(judging.summary())
    print(f"threshold {predictor.threshold:.4f} ({source})")
    pictures = "" if arguments.pictures == "none" else ", heat maps below heatmaps"
    print(f"results in {str(arguments.output)!r}: predictions.csv{pictures}")
    return 1 if judging.counts["unreadable"] else 0


def _threshold(text: str) -> float | None:
    if text == "auto":
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r} is neither auto nor a finite number")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = tool_parser(__doc__)
    parser.add_argument("--model", type=Path, required=True, metavar="FILE.binaryad")
    parser.add_argument("--encoder_weights", metavar="FILE", help="for a model file that only names its encoder")
    parser.add_argument("--input", type=Path, required=True, nargs="+", help="images, folders, or .txt lists of paths")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="made if it does not exist")
    parser.add_argument(
        "--threshold", type=_threshold, default="auto", metavar="auto|VALUE", help="NG above it; auto: the model file's"
    )
    parser.add_argument("--pictures", choices=["all", "anomalous", "none"], default="all", help="heat maps of which images")
    parser.add_argument(
        "--maps",
        choices=["none", "png16", "npy"],
        default="none",
        help="also maps/<image>.png (16 bit, 0: not looked at, scale in scale.json) or .npy (float32, NaN: not looked at)",
    )
    parser.add_argument("--device", default="cpu", metavar="auto|cpu|cuda[:i]")
    parser.add_argument("--threads", type=number(int, 1), help="of the CPU (default: all cores)")
    parser.add_argument(
        "--batch_size", type=number(int, 1), default=1, help="images at once; more than 1 pays off on a GPU only"
    )
    parser.add_argument("--max_pixels", type=number(int, 1), default=DEFAULT_MAX_PIXELS, help="refuse larger images")
    return run_command(parser, argv, predict)


if __name__ == "__main__":
    sys.exit(main())
