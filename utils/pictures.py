"""Heat maps over photographs, and contact sheets of the test images where a model did worst and best."""

import io
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torchvision.transforms.functional import InterpolationMode, center_crop, resize

from datasets.images import load_image
from utils.checkpoint import atomic_write
from utils.evaluation import Evaluation
from utils.settings import DataOptions

_TILE = 176
_MARGIN = 6
_TEXT_HEIGHT = 18
_PANELS = ("image", "mask", "heat map", "outline")
_ROWS_PER_CLASS = 3
_FULL_SCALE = 3.0  # a heat map is brightest at three times the distance from the normal median to the normal limit
_TRUTH_COLOUR, _OUTLINE_COLOUR = (0, 200, 0), (255, 40, 40)
_OK_COLOUR, _NG_COLOUR = (0, 120, 60), (190, 20, 30)
_INK, _PAPER = (30, 30, 30), (255, 255, 255)
_HEAT_WEIGHT, _DIMMING = 0.65, 0.4  # largest share of the heat map, and of black where the model did not look
_OUTLINE_SHARE = 128  # width of an outline on a tile: that part of its side
_STRIP_SHARE, _LEAST_STRIP = 18, 26  # height of a verdict strip: that part of the shorter side, at least so many pixels


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


def _full_scale(calibration: dict[str, float]) -> float:
    return _FULL_SCALE * max(calibration["map_limit"] - calibration["map_median"], 1e-6)


def heat_intensity(anomaly_map: np.ndarray, calibration: dict[str, float]) -> np.ndarray:
    """(H, W) scores -> 0..1: 0 up to the median of training images, 1 from the brightest colour on; NaN gives 0."""
    return np.nan_to_num(np.clip((anomaly_map - calibration["map_median"]) / _full_scale(calibration), 0, 1))


def heat_map(anomaly_map: np.ndarray, calibration: dict[str, float]) -> np.ndarray:
    """(H, W) scores -> (H, W, 3) RGB on a scale fixed by training images: black at their median, so normal stays dark."""
    intensity = heat_intensity(anomaly_map, calibration)
    return cv2.cvtColor(cv2.applyColorMap(np.uint8(np.round(255 * intensity)), cv2.COLORMAP_INFERNO), cv2.COLOR_BGR2RGB)


def outline(image: np.ndarray, region: np.ndarray, colour: tuple[int, int, int], thickness: int = 2) -> np.ndarray:
    """A copy of an RGB image with the borders of a boolean region drawn on it."""
    contours, _ = cv2.findContours(region.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    return cv2.drawContours(image.copy(), contours, -1, colour, thickness)


def outline_level(calibration: dict[str, float]) -> float:
    """Pixel score at half the heat map's scale: clearly above what training images show."""
    return calibration["map_median"] + 0.5 * _FULL_SCALE * (calibration["map_limit"] - calibration["map_median"])


def heat_overlay(photo: np.ndarray, anomaly_map: np.ndarray, calibration: dict[str, float]) -> np.ndarray:
    """A photo (H, W, 3) under its map (H, W): clear where that is normal, outlined where it is not, dimmed where it is NaN."""
    strength = np.minimum(1, 2 * heat_intensity(anomaly_map, calibration))  # full from the outline level on
    heat_weight = _HEAT_WEIGHT * strength * np.sqrt(strength)  # power 1.5: the faint heat of normal parts leaves no tint
    weight = np.where(np.isnan(anomaly_map), _DIMMING, heat_weight).astype(np.float32)
    blended = cv2.blendLinear(photo, heat_map(anomaly_map, calibration), 1 - weight, weight)
    thickness = max(1, min(photo.shape[:2]) // 200)
    return outline(blended, anomaly_map > outline_level(calibration), _OUTLINE_COLOUR, thickness)


def with_verdict(picture: np.ndarray, is_anomalous: bool, caption: str) -> Image.Image:
    """The picture, of unchanged size, below a strip: green OK or red NG; wider than the picture if the text needs it."""
    strip = max(_LEAST_STRIP, min(picture.shape[:2]) // _STRIP_SHARE)
    font, text = ImageFont.load_default(0.6 * strip), f"{'NG' if is_anomalous else 'OK'}   {caption}"
    width = max(picture.shape[1], int(font.getlength(text)) + strip)
    canvas = Image.new("RGB", (width, strip + picture.shape[0]), _PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.rectangle((0, 0, width, strip - 1), _NG_COLOUR if is_anomalous else _OK_COLOUR)
    draw.text((strip // 2, strip // 2), text, _PAPER, font, anchor="lm")
    canvas.paste(Image.fromarray(picture), (0, strip))
    return canvas


def sixteen_bit_range(calibration: dict[str, float]) -> tuple[float, float]:
    """Scores that pixels 1 and 65535 of a 16-bit map stand for: one heat map's scale below normal, four above."""
    return (
        calibration["map_median"] - _full_scale(calibration),
        calibration["map_median"] + 4 * _full_scale(calibration),
    )


def sixteen_bit_map(anomaly_map: np.ndarray, calibration: dict[str, float]) -> np.ndarray:
    """(H, W) scores -> uint16: linear from 1 to 65535 over `sixteen_bit_range`, clipped beyond it; NaN gives 0."""
    low, high = sixteen_bit_range(calibration)
    levels = 1 + np.clip((anomaly_map - low) / (high - low), 0, 1) * 65534
    return np.round(np.nan_to_num(levels)).astype(np.uint16)


def model_view(path: Path, data: DataOptions, side: int) -> np.ndarray:
    """What the model sees of an image, as (side, side, 3) RGB."""
    sizes, mode = [data.input_size, data.input_size], InterpolationMode(data.interpolation)
    image = resize(load_image(path, data.max_pixels), sizes, mode)
    return np.asarray(center_crop(image, [data.crop_size, data.crop_size]).resize((side, side)))


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
    write_picture(path, sheet, "JPEG", quality=85)


def write_picture(path: Path, picture: Image.Image, kind: str, **options) -> None:
    """Encode in memory, then write atomically: a full disk is a ResourceError, never half a picture."""
    content = io.BytesIO()
    picture.save(content, kind, **options)
    atomic_write(path, lambda file: file.write(content.getvalue()))


def _panels(evaluation: Evaluation, index: int, calibration: dict[str, float], data: DataOptions) -> list[np.ndarray]:
    anomaly_map, mask = evaluation.maps[index], evaluation.masks[index]
    side = len(mask)
    image, thickness = model_view(Path(evaluation.paths[index]), data, side), max(1, side // _OUTLINE_SHARE)
    truth = np.repeat(np.uint8(mask)[..., None] * 255, 3, axis=2)
    if not evaluation.has_pixel_truth[index]:
        truth[:] = 128  # unknown
    found = outline(image, anomaly_map > outline_level(calibration), _OUTLINE_COLOUR, thickness)
    return [image, truth, heat_map(anomaly_map, calibration), outline(found, mask, _TRUTH_COLOUR, thickness)]
