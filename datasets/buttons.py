"""Synthetic photographs of buttons: rendered, so that no licence binds them.

A button is a height field over its material, lit by one lamp. A defect (`datasets.button_defects`) changes the height field,
the material or the outline before the picture is taken, so that it is lit like everything else.
"""

from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.random import Generator
from scipy.ndimage import gaussian_filter1d, uniform_filter1d

Colour = tuple[float, float, float]


@dataclass(frozen=True)
class Kind:
    """One class of buttons.

    Attributes:
        material: a name in `_MATERIALS`.
        colour, background: sRGB, 0 to 1.
        holes: 2 or 4.
        hole_radius, hole_offset: of each hole and of its centre, in radii of the button.
        profile: (radius, height) from the centre outwards, in radii of the button.
        texture: how rough the background is.
        gloss: strength of the lamp's mirror image, and the cosines between which its edge lies.
    """

    material: str
    colour: Colour
    background: Colour
    holes: int
    hole_radius: float
    hole_offset: float
    profile: tuple[tuple[float, float], ...]
    texture: float
    gloss: tuple[float, float, float]


@dataclass(frozen=True)
class Scene:
    """What is in front of the camera; lengths in radii of the button, arrays (S, S) float32, colours linear (S, S, 3)."""

    kind: Kind
    pixel: float
    x: np.ndarray
    y: np.ndarray
    lamp: np.ndarray
    holes: np.ndarray
    outline: np.ndarray  # distance to the button's outline, positive outside
    height: np.ndarray
    albedo: np.ndarray
    background: np.ndarray
    noise: np.ndarray
    shine: np.ndarray | float = 1.0  # how much of the gloss is left
    thread: tuple[np.ndarray, np.ndarray, Colour] | None = None  # cover, shadow, colour


_BOWL = ((0.0, 0.10), (0.58, 0.10), (0.70, 0.17), (0.82, 0.21), (0.90, 0.20), (1.0, 0.0), (1.3, -0.7))
_STEP = ((0.0, 0.12), (0.50, 0.125), (0.56, 0.165), (0.86, 0.175), (1.0, 0.06), (1.3, -0.4))
_GROOVE = ((0.0, 0.13), (0.62, 0.15), (0.66, 0.115), (0.70, 0.115), (0.74, 0.16), (0.90, 0.16), (1.0, 0.06), (1.3, -0.3))
_PLATE = ((0.0, 0.08), (0.70, 0.10), (0.78, 0.155), (0.93, 0.165), (1.0, 0.05), (1.3, -0.5))

KINDS = {
    "class1": Kind("plastic", (0.13, 0.22, 0.42), (0.80, 0.79, 0.77), 4, 0.085, 0.21, _BOWL, 0.03, (0.55, 0.90, 0.98)),
    "class2": Kind("pearl", (0.79, 0.775, 0.74), (0.23, 0.24, 0.26), 2, 0.105, 0.22, _STEP, 0.10, (0.40, 0.86, 0.98)),
    "class3": Kind("wood", (0.67, 0.46, 0.28), (0.86, 0.86, 0.85), 4, 0.090, 0.22, _GROOVE, 0.02, (0.10, 0.75, 1.00)),
    "class4": Kind("metal", (0.60, 0.59, 0.57), (0.34, 0.38, 0.36), 2, 0.105, 0.24, _PLATE, 0.06, (0.45, 0.84, 0.99)),
}


def linear(colour: Colour) -> np.ndarray:
    """sRGB colour, 0 to 1, as linear light."""
    return np.power(np.asarray(colour, np.float32), 2.2)


def ramp(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """0 below low, 1 above high, smooth between."""
    t = np.clip((values - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)


def clouds(generator: Generator, side: int, cells: int) -> np.ndarray:
    """Smooth noise of about unit strength with features of 1/cells of the picture: (S, S)."""
    return cv2.resize(generator.standard_normal((cells + 3,) * 2, np.float32), (side, side), interpolation=cv2.INTER_CUBIC)


def _streaks(generator: Generator, side: int, length: float, axis: int = 1) -> np.ndarray:
    """Noise of unit strength drawn out along an axis, whose ends meet; length in pictures: (S, S)."""
    noise = generator.standard_normal((side, side), np.float32)
    noise = uniform_filter1d(noise, max(3, round(length * side)), axis, mode="wrap")
    return noise / noise.std()


def _plastic(generator: Generator, side: int) -> tuple[np.ndarray, np.ndarray]:
    shade = 1 + 0.12 * np.linspace(-1, 1, side, dtype=np.float32)[:, None] + 0.02 * clouds(generator, side, 3)
    return shade[..., None], 0.0003 * clouds(generator, side, 40)


def _pearl(generator: Generator, side: int) -> tuple[np.ndarray, np.ndarray]:
    layers = sum(strength * clouds(generator, side, cells) for strength, cells in ((1.2, 4), (0.7, 9), (0.4, 20), (0.15, 60)))
    layers += 2 * np.linspace(-1, 1, side, dtype=np.float32)[:, None] + 0.08 * _streaks(generator, side, 0.08)
    tint = np.sin(layers[..., None] + np.float32([0, 1.6, 3.4]))
    return (1 + 0.055 * tint) * (1 + 0.06 * np.sin(2.3 * layers + 1))[..., None], 0.0008 * layers


def _wood(generator: Generator, side: int) -> tuple[np.ndarray, np.ndarray]:
    along, across = np.meshgrid(*[np.linspace(-1, 1, side, dtype=np.float32)] * 2)
    warp = 0.04 * clouds(generator, side, 3) + 0.004 * clouds(generator, side, 30)
    rings = (0.5 + 0.5 * np.sin(55 * (across + 0.3 * (along + generator.uniform(-0.5, 0.5)) ** 2 + warp))) ** 3
    fibres, pores = _streaks(generator, side, 0.06), ramp(_streaks(generator, side, 0.025), 1.8, 2.8)
    shade = (1 - 0.38 * rings) * (1 + 0.06 * fibres) * (1 - 0.4 * pores)
    return np.power(shade[..., None], np.float32([0.8, 1.0, 1.25])), (0.15 * fibres - pores) / side


def _metal(generator: Generator, side: int) -> tuple[np.ndarray, np.ndarray]:
    turning = _streaks(generator, side, 0.1, axis=0) + 0.7 * _streaks(generator, side, 0.5, axis=0)
    flags = cv2.WARP_POLAR_LINEAR | cv2.WARP_INVERSE_MAP | cv2.WARP_FILL_OUTLIERS
    brushed = cv2.warpPolar(turning, (side, side), (side / 2, side / 2), 0.75 * side, flags)
    return (1 + 0.06 * brushed)[..., None], 0.12 / side * brushed


# generator, side -> what multiplies the colour (S, S, 1 or 3), relief (S, S)
_MATERIALS: dict[str, Callable] = {"plastic": _plastic, "pearl": _pearl, "wood": _wood, "metal": _metal}


def _turned_height(kind: Kind, distance: np.ndarray) -> np.ndarray:
    """Height at a distance from the centre: the kind's profile with its corners rounded."""
    table = np.linspace(0, 2.5, 4096)
    smooth = gaussian_filter1d(np.interp(table, *np.transpose(kind.profile)), 0.018 / 2.5 * 4096, mode="nearest")
    return np.interp(distance, table, smooth).astype(np.float32)


def scene_of(generator: Generator, kind: Kind, side: int) -> Scene:
    """A good button in its place: everything of the picture that is chance is drawn here."""
    radius, angle = side * generator.uniform(0.372, 0.378), generator.uniform(0, 360)
    centre = np.float32(side / 2 + side * generator.uniform(-0.025, 0.025, 2))
    azimuth, elevation = np.radians([generator.normal(-130, 8), generator.normal(52, 2.5)])
    lamp = np.float32([np.cos(azimuth) * np.cos(elevation), np.sin(azimuth) * np.cos(elevation), np.sin(elevation)])
    rows = (np.arange(side, dtype=np.float32) - centre[1]) / radius
    columns = (np.arange(side, dtype=np.float32) - centre[0]) / radius
    y, x = np.meshgrid(rows, columns, indexing="ij")
    distance = np.hypot(x, y)
    tone, relief = _MATERIALS[kind.material](generator, side)
    matrix = cv2.getRotationMatrix2D((side / 2, side / 2), angle, 1)
    matrix[:, 2] += centre - side / 2
    tone, relief = (cv2.warpAffine(part, matrix, (side, side), borderMode=cv2.BORDER_REFLECT) for part in (tone, relief))
    turns = np.radians(angle) + 2 * np.pi / kind.holes * np.arange(kind.holes)
    holes = kind.hole_offset * np.stack([np.cos(turns), -np.sin(turns)], axis=1)
    grain = cv2.GaussianBlur(generator.standard_normal((side, side), np.float32), (0, 0), side / 900)
    ground = 1 + kind.texture * (grain / grain.std() + clouds(generator, side, 25)) + 0.02 * clouds(generator, side, 2)
    grey = generator.standard_normal((side, side, 1), np.float32)
    noise = grey + 0.5 * generator.standard_normal((side, side, 3), np.float32)
    colour = linear(kind.colour) * generator.normal(1, 0.02)
    return Scene(
        kind=kind,
        pixel=1 / radius,
        x=x,
        y=y,
        lamp=lamp,
        holes=holes.astype(np.float32),
        outline=distance - 1,
        height=_turned_height(kind, distance) + relief,
        albedo=np.atleast_3d(tone) * colour,
        background=ground[..., None] * linear(kind.background),
        noise=noise,
    )


def _hole_distance(scene: Scene, shift: np.ndarray | tuple[float, float] = (0, 0)) -> np.ndarray:
    """Distance to the edge of the nearest hole, negative inside, seen from points moved by a shift."""
    squares = [(scene.x - hole[0]) ** 2 + (scene.y - hole[1]) ** 2 for hole in scene.holes - np.float32(shift)]
    return np.sqrt(np.minimum.reduce(squares)) - scene.kind.hole_radius


def photograph(scene: Scene) -> np.ndarray:
    """The picture of a scene: (S, S, 3) uint8."""
    into_hole = _hole_distance(scene)
    height = scene.height - 0.06 * (1 - ramp(into_hole, -0.03, 0.035))
    slope_y, slope_x = np.gradient(height, scene.pixel)
    upright = 1 / np.sqrt(1 + slope_x**2 + slope_y**2)
    facing = (scene.lamp[2] - slope_x * scene.lamp[0] - slope_y * scene.lamp[1]) * upright
    gloss = _gloss(scene, 2 * upright * facing - scene.lamp[2], upright)
    light = 0.22 + 0.18 * upright + 0.85 * np.maximum(facing, 0)
    button = scene.albedo * light[..., None] + (scene.shine * gloss)[..., None]
    ground = scene.background * _ground_light(scene, into_hole)[..., None]
    covered = np.clip(0.5 - scene.outline / scene.pixel, 0, 1) * np.clip(0.5 + into_hole / scene.pixel, 0, 1)
    picture = ground + covered[..., None] * (button - ground)
    if scene.thread is not None:
        cover, shadow, colour = scene.thread
        picture = picture * (1 - 0.5 * shadow[..., None])
        picture += cover[..., None] * (linear(colour) * (0.35 + 0.75 * cover[..., None]) - picture)
    return _developed(picture, scene.noise)


def _gloss(scene: Scene, mirror: np.ndarray, upright: np.ndarray) -> np.ndarray:
    """Mirror image of the lamp, where `mirror` is the cosine between its direction and the mirrored view: (S, S)."""
    strength, low, high = scene.kind.gloss
    gloss = strength * ramp(mirror, low, high) + 0.06 * strength * ramp(mirror, 0.2, 1.0) + 0.12 * strength * (1 - upright)
    if scene.kind.material == "metal":  # grooves around the centre throw the light across themselves: a bow tie
        across = (scene.y * scene.lamp[0] - scene.x * scene.lamp[1]) / (np.hypot(scene.x, scene.y) + 1e-3)
        gloss += 0.4 * (1 - across**2) ** 12
    return gloss


def _ground_light(scene: Scene, into_hole: np.ndarray) -> np.ndarray:
    """How much light reaches the background beside the button and at the bottom of its holes: (S, S)."""
    away = scene.lamp[:2] / scene.lamp[2]
    umbra = np.hypot(scene.x + 0.11 * away[0], scene.y + 0.11 * away[1]) - 1
    light = 1 - 0.5 * (1 - ramp(umbra, -0.09, 0.10)) - 0.22 * np.exp(-np.maximum(scene.outline, 0) / 0.05)
    bottom = 0.10 + 0.35 * (1 - ramp(_hole_distance(scene, 0.13 * away), -0.05, 0.02))
    return np.where(into_hole < scene.pixel, bottom, light)


def _developed(picture: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """What lens and sensor make of linear light: blur, gamma, noise, 8 bits."""
    side = len(picture)
    picture = cv2.GaussianBlur(picture.astype(np.float32), (0, 0), max(0.45, 0.8 * side / 1024))
    picture = 255 * np.power(np.clip(picture, 0, 1), 1 / 2.2)
    return np.clip(picture + noise * (0.9 + 0.004 * picture) + 0.5, 0, 255).astype(np.uint8)


def button(generator: Generator, kind: Kind, side: int) -> np.ndarray:
    """A good button: (S, S, 3) uint8, RGB."""
    return photograph(scene_of(generator, kind, side))
