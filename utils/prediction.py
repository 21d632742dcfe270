"""From photographs to verdicts: the Python interface to a finished model, and which files a command line means."""

import codecs
import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from common.errors import NumericError, UserError
from common.readers import Source, read_bytes
from datasets.images import DEFAULT_MAX_PIXELS, IMAGE_SUFFIXES, is_image_file, load_image
from datasets.transforms import IMAGENET_MEAN, IMAGENET_STD, Interpolation, image_transform
from models.detector import Detector
from utils.packed_model import load_packed
from utils.protocol import EvaluationOptions, image_score, smoothed_map

logger = logging.getLogger(__name__)

RESULT_FOLDERS = ("heatmaps", "maps")  # beside a predictions.csv; never read as input
_LONGEST_NAME = 180  # bytes
Photo = str | os.PathLike | Image.Image | np.ndarray


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a model says about one image.

    Attributes:
        path: the image's file, None for an image from memory.
        score: of the whole image, higher is more anomalous.
        is_anomalous: whether the score is greater than the threshold.
        map: (H, W) float32, score of every pixel of the original image (as displayed), NaN outside the centre crop.
    """

    path: Path | None
    score: float
    is_anomalous: bool
    map: np.ndarray

    @property
    def verdict(self) -> str:
        """OK or NG."""
        return "NG" if self.is_anomalous else "OK"


class Predictor:
    """Calls a model on images, with the numbers of `utils.evaluation.evaluate`.

    It may be shared by threads. Do not fork a process after its first use with several CPU threads: as with all of torch,
    the child would wait for threads that it does not have.

    Attributes:
        threshold: an image is anomalous if its score is greater; the model file's at first, may be set.
        calibration: `map_median` and `map_limit` of normal images, the fixed scale of heat maps.
    """

    def __init__(self, detector: Detector, metadata: dict, device: torch.device | str, name: str = "the model"):
        """`metadata` needs preprocessing, protocol, calibration and decision; raises UserError for unknown preprocessing."""
        preprocessing = metadata["preprocessing"]
        if (tuple(preprocessing["mean"]), tuple(preprocessing["std"])) != (IMAGENET_MEAN, IMAGENET_STD):
            raise UserError(
                f"unknown preprocessing: {name} wants mean {preprocessing['mean']} and std {preprocessing['std']}, "
                f"this program normalises with {list(IMAGENET_MEAN)} and {list(IMAGENET_STD)}; update the program"
            )
        interpolation = preprocessing.get("interpolation", "bilinear")
        if interpolation not in get_args(Interpolation):
            raise UserError(
                f"unknown preprocessing: {name} wants interpolation {interpolation!r}, this program knows "
                f"{' and '.join(get_args(Interpolation))}; update the program"
            )
        self.device = torch.device(device)
        self.detector = detector.to(self.device).eval()
        self.metadata = metadata
        self.calibration = metadata["calibration"]
        self.threshold = float(metadata["decision"]["threshold"])
        self._input_size, self._crop_size = preprocessing["input_size"], preprocessing["crop_size"]
        self._transform = image_transform(self._input_size, self._crop_size, interpolation)
        self._protocol = EvaluationOptions.from_config(metadata["protocol"])

    @classmethod
    def load(
        cls, path: str | os.PathLike, device: torch.device | str = "cpu", encoder_weights: str | None = None
    ) -> "Predictor":
        """Open a `.binaryad` file; raises UserError if it is no usable model or its encoder, if not in it, cannot be had."""
        return cls(*load_packed(Path(path), device, encoder_weights), device, repr(str(path)))

    def __call__(self, image: Photo) -> Prediction:
        """Judge one image: a file, a PIL image, or an RGB (H, W, 3) or grey (H, W) uint8 array; errors as `predict_batch`."""
        return self.predict_batch([image])[0]

    def predict_batch(self, images: Sequence[Photo]) -> list[Prediction]:
        """Judge several images at once.

        Raises:
            UserError: an image cannot be read or is of another kind. NumericError: a map is not finite.
        """
        photos = [rgb_photo(image) for image in images]
        paths = [Path(image) if isinstance(image, (str, os.PathLike)) else None for image in images]
        return self.judge([self.preprocess(photo) for photo in photos], [photo.size for photo in photos], paths)

    def preprocess(self, photo: Image.Image) -> Tensor:
        """An RGB image as the model's input (3, crop, crop)."""
        return self._transform(photo)

    @torch.no_grad()
    def judge(self, inputs: list[Tensor], sizes: list[tuple[int, int]], paths: list[Path | None]) -> list[Prediction]:
        """Preprocessed images, their original (width, height) and files -> predictions; NumericError names the image."""
        if not inputs:
            return []
        maps = smoothed_map(self.detector.anomaly_map(torch.stack(inputs).to(self.device)).float(), self._protocol)
        scores = image_score(maps, self._protocol.max_ratio).tolist()
        predictions = []
        for index, (anomaly_map, score, size, path) in enumerate(zip(maps.cpu(), scores, sizes, paths, strict=True)):
            if not anomaly_map.isfinite().all():
                name = f"image {index}" if path is None else repr(str(path))
                raise NumericError(f"the anomaly map of {name} is not finite; the model is damaged, export or train it again")
            placed = placed_map(anomaly_map, size, self._input_size, self._crop_size)
            predictions.append(Prediction(path, score, score > self.threshold, placed))
        return predictions


def rgb_photo(image: Photo, max_pixels: int = DEFAULT_MAX_PIXELS) -> Image.Image:
    """A file or an image in memory as RGB with its EXIF rotation applied; raises UserError if that cannot be done."""
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or not image.size or (image.ndim != 2 and image.shape[2:] != (3,)):
            raise UserError(
                f"cannot use an array of shape {image.shape} and type {image.dtype} as an image; "
                "expected uint8 of shape (height, width, 3) in RGB order or (height, width)"
            )
        return Image.fromarray(image).convert("RGB")
    if isinstance(image, Image.Image):
        if image.mode.startswith(("I", "F")):
            raise UserError(f"cannot use a PIL image of mode {image.mode!r}; convert it to 8 bits, or give its file instead")
        return ImageOps.exif_transpose(image).convert("RGB")
    if not isinstance(image, (str, os.PathLike)):
        raise UserError(f"cannot use a {type(image).__name__} as an image; expected a path, a PIL image or a uint8 array")
    return load_image(Path(image), max_pixels)


def placed_map(anomaly_map: Tensor, size: tuple[int, int], input_size: int, crop_size: int) -> np.ndarray:
    """A map (side, side) of the centre crop -> (height, width) float32 of the whole image, bilinear, NaN outside the crop."""
    (width, height), side = size, len(anomaly_map)
    rows, row_weights = _axis_weights(height, input_size, crop_size, side)
    columns, column_weights = _axis_weights(width, input_size, crop_size, side)
    placed = np.full((height, width), np.nan, np.float32)
    placed[rows, columns] = (row_weights @ anomaly_map @ column_weights.T).numpy()
    return placed


def _axis_weights(length: int, input_size: int, crop_size: int, side: int) -> tuple[slice, Tensor]:
    """Pixels of an image's side whose centres the crop holds, and (pixels, side) weights of the map's pixels for them."""
    crop_start = round((input_size - crop_size) / 2)  # as torchvision's centre crop rounds
    resized = (np.arange(length) + 0.5) * input_size / length
    position = (resized - crop_start) * side / crop_size
    start, stop = np.searchsorted(position, (0, side))
    centre = np.clip(position[start:stop] - 0.5, 0, side - 1)
    weights = np.maximum(0, 1 - np.abs(centre[:, None] - np.arange(side)))
    return slice(start, stop), torch.from_numpy(weights).float()


def find_images(inputs: Sequence[Path], output: Path | None = None) -> dict[Path, Path]:
    """Images that files, folders (to any depth) and `.txt` lists name -> a relative path of its own for each one's results.

    The relative paths start at the deepest folder that holds all inputs. `output` and the results of earlier runs, wherever
    they lie, are passed over.

    Raises:
        UserError: an input does not exist, holds no image or cannot be read.
    """
    skipped = None if output is None else output.resolve()
    found, roots = {}, []
    for given in inputs:
        if os.path.isdir(given):
            images, folders = list(_images_below(given, skipped)), [given]
        elif given.suffix.lower() == ".txt" and os.path.isfile(given):
            images = _listed_images(given)
            folders = [image.parent for image in images]
        elif os.path.isfile(given):
            images, folders = [given], [given.parent]
        else:
            raise UserError(f"input not found: {str(given)!r}; expected an image, a folder of images or a .txt list of paths")
        if not images:
            suffixes = " ".join(sorted(suffix.removeprefix(".") for suffix in IMAGE_SUFFIXES))
            raise UserError(
                f"no images in {str(given)!r}; expected a list of paths, one a line, or a folder that holds, at any depth, "
                f"visible files of type {suffixes}"
            )
        found.update({os.path.abspath(image): image for image in images})
        roots += map(os.path.abspath, folders)
    start = os.path.commonpath(roots)
    return {image: _shortened(Path(os.path.relpath(absolute, start))) for absolute, image in found.items()}


def _shortened(path: Path) -> Path:
    """The path, its last part cut where it leaves no room for the suffixes of results and temporary files."""
    name = os.fsencode(path.name)
    if len(name) <= _LONGEST_NAME:
        return path
    return path.with_name(f"{os.fsdecode(name[:_LONGEST_NAME])}~{hashlib.sha256(name).hexdigest()[:8]}")


def _images_below(folder: Path, skipped: Path | None) -> Iterator[Path]:
    for parent, names, files in os.walk(folder, onerror=_refuse_folder):
        paths = [Path(parent, name) for name in sorted(names) if not name.startswith(".")]
        for link in (path for path in paths if path.is_symlink()):
            logger.warning("not followed: %r is a link to a folder; give it as an --input of its own", str(link))
        results = RESULT_FOLDERS if "predictions.csv" in files else ()
        names[:] = [path.name for path in paths if path.name not in results and path.resolve() != skipped]
        yield from filter(is_image_file, (Path(parent, name) for name in sorted(files)))


def _refuse_folder(error: OSError) -> None:
    raise UserError(f"cannot read the folder {error.filename!r}: {error.strerror}; check its permissions") from error


def _listed_images(path: Path) -> list[Path]:
    """Paths in a text file, one a line, relative to its folder."""
    lines = read_bytes(Source(path, "list of images", "give another")).removeprefix(codecs.BOM_UTF8).splitlines()
    return [path.parent / os.fsdecode(line.strip()) for line in lines if line.strip()]
