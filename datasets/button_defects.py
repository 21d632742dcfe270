"""Small defects of the synthetic buttons, put into a scene before its picture is taken."""

from collections.abc import Callable
from dataclasses import replace

import cv2
import numpy as np
from numpy.random import Generator

from datasets.buttons import Kind, Scene, clouds, linear, photograph, ramp, scene_of

_VISIBLE = 5  # grey levels: smaller changes drown in the sensor's noise
_DARK = 0.12  # mean linear colour of the material: dirt and threads are light on it


def _stroke(scene: Scene, points: np.ndarray, widths: np.ndarray) -> np.ndarray:
    """Cover of a line through points (N, 2), as wide as `widths` (N,) at each of them: (S, S), 0 to 1."""
    side, scale = len(scene.x), 2 / scene.pixel
    canvas = np.zeros((2 * side, 2 * side), np.uint8)
    corner = np.array([scene.x[0, 0], scene.y[0, 0]])
    ends = np.round(((points - corner) * scale + 0.5) * 16).astype(int)
    for start, end, width in zip(ends[:-1], ends[1:], widths, strict=False):
        cv2.line(canvas, start.tolist(), end.tolist(), 255, max(1, round(width * scale)), cv2.LINE_AA, shift=4)
    return cv2.resize(canvas, (side, side), interpolation=cv2.INTER_AREA).astype(np.float32) / 255


def _polar(radius: float, angle: float) -> np.ndarray:
    return radius * np.array([np.cos(angle), np.sin(angle)])


def _arc(generator: Generator, start: np.ndarray, end: np.ndarray, bend: float) -> np.ndarray:
    """Points of a smooth curve between two points: (49, 2)."""
    along = end - start
    middle = (start + end) / 2 + generator.uniform(-bend, bend) * np.array([-along[1], along[0]])
    t = np.linspace(0, 1, 49)[:, None]
    return (1 - t) ** 2 * start + 2 * t * (1 - t) * middle + t**2 * end


def _painted(scene: Scene, cover: np.ndarray, colour: np.ndarray) -> np.ndarray:
    """The material's colour with another one over it where `cover` is 1."""
    return scene.albedo + cover[..., None] * (colour - scene.albedo)


def _scratch(generator: Generator, scene: Scene) -> Scene:
    angle = generator.uniform(0, 2 * np.pi)
    start = _polar(generator.uniform(0.4, 0.8), angle)
    end = start + _polar(generator.uniform(0.45, 0.75), angle + np.pi + generator.uniform(-0.9, 0.9))
    points = _arc(generator, start, end, 0.25)
    width = generator.uniform(0.009, 0.014) * np.sin(np.linspace(0.35, np.pi - 0.2, len(points)))
    groove = _stroke(scene, points, width) * (0.75 + 0.2 * clouds(generator, len(scene.x), 50))
    bare = 0.55 * scene.albedo + 0.45 * scene.albedo.mean() + 0.25
    depth = cv2.GaussianBlur(groove, (0, 0), 0.003 / scene.pixel)
    return replace(scene, height=scene.height - 0.011 * depth, albedo=_painted(scene, np.clip(0.6 * groove, 0, 1), bare))


def _chip(generator: Generator, scene: Scene) -> Scene:
    bite = _polar(generator.uniform(0.98, 1.01), generator.uniform(0, 2 * np.pi))
    distance = np.hypot(scene.x - bite[0], scene.y - bite[1]) - generator.uniform(0.06, 0.09)
    distance += 0.010 * clouds(generator, len(scene.x), 24) + 0.004 * clouds(generator, len(scene.x), 90)
    broken = 1 - ramp(distance, 0.0, 0.05)
    rough = 1 + 0.15 * clouds(generator, len(scene.x), 110)
    return replace(
        scene,
        outline=np.maximum(scene.outline, -distance),
        height=scene.height - 0.05 * broken * rough,
        albedo=_painted(scene, 0.6 * broken, 1.1 * scene.albedo + 0.08),
    )


def _stain(generator: Generator, scene: Scene) -> Scene:
    spot = _polar(generator.uniform(0.35, 0.85), generator.uniform(0, 2 * np.pi))
    radius, stretch = generator.uniform(0.06, 0.11), generator.uniform(0.8, 1.25)
    distance = np.hypot((scene.x - spot[0]) * stretch, (scene.y - spot[1]) / stretch) / radius
    distance += 0.22 * clouds(generator, len(scene.x), 18) + 0.06 * clouds(generator, len(scene.x), 60)
    rim = np.exp(-(((distance - 0.95) / 0.14) ** 2))
    cover = (1 - ramp(distance, 0.6, 1.25)) * (0.5 + 0.25 * rim)
    dirt = linear((0.72, 0.68, 0.60) if scene.albedo.mean() < _DARK else (0.35, 0.24, 0.12))
    return replace(scene, albedo=_painted(scene, cover, dirt), shine=1 - 0.8 * cover)


def _blocked_hole(generator: Generator, scene: Scene) -> Scene:
    number = generator.integers(len(scene.holes))
    hole = scene.holes[number]
    distance = np.hypot(scene.x - hole[0], scene.y - hole[1]) - scene.kind.hole_radius
    filled = 1 - ramp(distance, -0.02, 0.01)
    dent = generator.uniform(0.015, 0.03) * filled * (1 + 0.12 * clouds(generator, len(scene.x), 40))
    darker = generator.uniform(0.72, 0.85) * scene.albedo
    return replace(
        scene,
        holes=np.delete(scene.holes, number, axis=0),
        height=scene.height - dent,
        albedo=_painted(scene, filled, darker),
    )


def _thread(generator: Generator, scene: Scene) -> Scene:
    angle = generator.uniform(0, 2 * np.pi)
    start = _polar(generator.uniform(0.1, 0.7), angle)
    end = start + _polar(generator.uniform(0.35, 0.7), generator.uniform(0, 2 * np.pi))
    points = _arc(generator, start, end, 0.8)
    width = np.full(len(points), generator.uniform(0.010, 0.014))
    cover = cv2.GaussianBlur(_stroke(scene, points, width), (0, 0), 0.002 / scene.pixel)
    away = -0.014 * scene.lamp[:2] / scene.lamp[2]
    shadow = cv2.GaussianBlur(_stroke(scene, points + away, width), (0, 0), 0.005 / scene.pixel)
    plain = (0.85, 0.83, 0.78) if scene.albedo.mean() < _DARK else (0.12, 0.12, 0.14)
    colour = (plain, (0.72, 0.12, 0.12))[generator.integers(2)]
    return replace(scene, thread=(cover, shadow, colour))


def _crack(generator: Generator, scene: Scene) -> Scene:
    start = generator.uniform(0, 2 * np.pi)
    radii = 1.01 - 0.018 * np.arange(generator.integers(24, 36))
    sways = np.sign(generator.standard_normal(len(radii) // 4 + 1)).repeat(4)[: len(radii)]
    angles = start + np.cumsum((generator.normal(0, 0.012, len(radii)) + 0.010 * sways) / radii)
    points = radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    gap = _stroke(scene, points, np.linspace(0.013, 0.006, len(points)))
    depth = cv2.GaussianBlur(gap, (0, 0), 0.003 / scene.pixel)
    left = 1 - 0.85 * gap
    return replace(scene, height=scene.height - 0.012 * depth, albedo=scene.albedo * left[..., None], shine=left)


DEFECTS: dict[str, Callable[[Generator, Scene], Scene]] = {
    "scratch": _scratch,
    "chip": _chip,
    "stain": _stain,
    "blocked_hole": _blocked_hole,
    "thread": _thread,
    "crack": _crack,
}


def with_defect(generator: Generator, kind: Kind, side: int, defect: str) -> tuple[np.ndarray, np.ndarray]:
    """The button that `button` gives for the same generator, with one of `DEFECTS`, and a mask of what changed.

    Outside the mask the picture is that button's, to the bit: changes too faint to see are undone. Narrow gaps, where the
    defect happens to look as the button did, belong to the mask.

    Returns:
        (S, S, 3) uint8, RGB, and (S, S) bool.
    """
    scene = scene_of(generator, kind, side)
    good, defective = photograph(scene), photograph(DEFECTS[defect](generator, scene))
    changed = np.abs(good.astype(np.int16) - defective).max(axis=2) > _VISIBLE
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * max(1, side // 256) + 1,) * 2)
    mask = cv2.morphologyEx(changed.astype(np.uint8), cv2.MORPH_CLOSE, disc) > 0
    return np.where(mask[..., None], defective, good), mask
