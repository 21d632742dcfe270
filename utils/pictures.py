"""Contact sheets: the test images where a model did worst and best, with truth, heat map and outline."""

import io
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.functional import center_crop, resize

from datasets.images import load_image
from utils.checkpoint import atomic_write
from utils.evaluation import METRIC_SIZE, Evaluation
from utils.settings import DataOptions

_TILE = 176
_MARGIN = 6
_TEXT_HEIGHT = 18
_PANELS = ("image", "mask", "heat map", "outline")
_ROWS_PER_CLASS = 3
_FULL_SCALE = 3.0  # a heat map is brightest at three times the distance from the normal median to the normal limit
_TRUTH_COLOUR, _OUTLINE_COLOUR = (0, 200, 0), (255, 40, 40)
_INK, _PAPER = (30, 30, 30), (255, 255, 255)


@dataclass(frozen=True)
class Pick:
    """One row of the sheet: which image, and why it is shown."""

    index: int
    reason: str


def pick_worst_and_best(scores: np.ndarray, labels: np.ndarray) -> tuple[list[Pick], list[Pick]]:
    """(worst, best): missed defects and false alarms, clear defects and quiet good images, at most three of each."""
    ascending = np.argsort(scores, kind="stable")
    good = [int(index) for index in ascending if labels[index] == 0]
    defective = [int(index) for index in ascending if labels[index] == 1]

    def rows(indices: list[int], reason: str) -> list[Pick]:
        return [Pick(index, reason) for index in indices[:_ROWS_PER_CLASS]]

    worst = rows(defective, "defective, lowest score") + rows(good[::-1], "good, highest score")
    best = rows(defective[::-1], "defective, highest score") + rows(good, "good, lowest score")
    return worst, best


def heat_map(anomaly_map: np.ndarray, calibration: dict[str, float]) -> np.ndarray:
    """(H, W) scores -> (H, W, 3) RGB on a scale fixed by training images: black at their median, so normal stays dark."""
    span = _FULL_SCALE * max(calibration["map_limit"] - calibration["map_median"], 1e-6)
    intensity = np.clip((anomaly_map - calibration["map_median"]) / span, 0, 1)
    return cv2.cvtColor(cv2.applyColorMap(np.uint8(np.round(255 * intensity)), cv2.COLORMAP_INFERNO), cv2.COLOR_BGR2RGB)


def outline(image: np.ndarray, region: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """A copy of an RGB image with the borders of a boolean region drawn on it."""
    contours, _ = cv2.findContours(region.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    return cv2.drawContours(image.copy(), contours, -1, colour, 2)


def outline_level(calibration: dict[str, float]) -> float:
    """Pixel score at half the heat map's scale: clearly above what training images show."""
    return calibration["map_median"] + 0.5 * _FULL_SCALE * (calibration["map_limit"] - calibration["map_median"])


def model_view(path: Path, data: DataOptions) -> np.ndarray:
    """What the model sees of an image, as (256, 256, 3) RGB."""
    image = resize(load_image(path, data.max_pixels), [data.input_size, data.input_size])
    return np.asarray(center_crop(image, [data.crop_size, data.crop_size]).resize((METRIC_SIZE, METRIC_SIZE)))


def write_contact_sheet(path: Path, evaluation: Evaluation, calibration: dict[str, float], data: DataOptions) -> None:
    """Draw the worst images on the left and the best on the right, one row each."""
    columns = pick_worst_and_best(evaluation.scores, evaluation.labels)
    width = len(_PANELS) * (_TILE + _MARGIN) + _MARGIN
    row_height = _TILE + _TEXT_HEIGHT + _MARGIN
    height = 2 * (_TEXT_HEIGHT + _MARGIN) + row_height * max(map(len, columns))
    sheet = Image.new("RGB", (len(columns) * width + 2 * _MARGIN, height), _PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for number, (title, picks) in enumerate(zip(("WORST", "BEST"), columns, strict=True)):
        left = number * (width + 2 * _MARGIN)
        draw.text((left + _MARGIN, _MARGIN), title, _INK, font)
        for panel, name in enumerate(_PANELS):
            draw.text((left + _MARGIN + panel * (_TILE + _MARGIN), _TEXT_HEIGHT + _MARGIN), name, _INK, font)
        for row, pick in enumerate(picks):
            top = 2 * (_TEXT_HEIGHT + _MARGIN) + row * row_height
            image_path = Path(evaluation.paths[pick.index])
            name = f"{image_path.parent.name}/{image_path.name}".encode("ascii", "replace").decode().replace("\n", " ")
            draw.text((left + _MARGIN, top), f"{name}  {pick.reason} {evaluation.scores[pick.index]:.4f}", _INK, font)
            for panel, tile in enumerate(_panels(evaluation, pick.index, calibration, data)):
                place = (left + _MARGIN + panel * (_TILE + _MARGIN), top + _TEXT_HEIGHT)
                sheet.paste(Image.fromarray(tile).resize((_TILE, _TILE)), place)
    content = io.BytesIO()
    sheet.save(content, "JPEG", quality=85)
    atomic_write(path, lambda file: file.write(content.getvalue()))


def _panels(evaluation: Evaluation, index: int, calibration: dict[str, float], data: DataOptions) -> list[np.ndarray]:
    image, anomaly_map = model_view(Path(evaluation.paths[index]), data), evaluation.maps[index]
    mask = evaluation.masks[index]
    truth = np.repeat(np.uint8(mask)[..., None] * 255, 3, axis=2)
    if not evaluation.has_pixel_truth[index]:
        truth[:] = 128  # unknown
    found = outline(image, anomaly_map > outline_level(calibration), _OUTLINE_COLOUR)
    return [image, truth, heat_map(anomaly_map, calibration), outline(found, mask, _TRUTH_COLOUR)]
