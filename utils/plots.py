"""Small plots as inline SVG, without a plotting library: curve, histogram, and points with labels."""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP = 460, 220, 52, 28, 24
_BINS = 40
_GOOD_COLOUR, _DEFECTIVE_COLOUR, _LINE_COLOUR = "#4878a8", "#d1495b", "#333"
STAGE_COLOURS = {0: "#4878a8", 1: "#e08e2b", 2: "#d1495b"}

_SCATTER_PLOT_WIDTH, _SCATTER_LEFT, _SCATTER_BOTTOM, _SCATTER_TOP = 360, 58, 44, 30
_SCATTER_LEAST_HEIGHT = 260
_LABEL_HEIGHT, _LABEL_GAP, _CHARACTER_WIDTH, _LABEL_SIZE = 15, 28, 6.4, 11
_TICKS = 5


@dataclass(frozen=True)
class Point:
    """One labelled point; `spread` is the half length of a vertical bar, 0 for none."""

    label: str
    x: float
    y: float
    colour: str
    spread: float = 0.0


def loss_curve(title: str, points: list[tuple[int, float]]) -> str:
    """Loss by iteration, from 0."""
    x_range = (points[0][0], points[-1][0])
    y_range = (0.0, max(loss for _, loss in points))
    path = " ".join(
        f"{place(x, *x_range, _LEFT, _WIDTH - 10):.1f},{place(y, *y_range, _HEIGHT - _BOTTOM, _TOP):.1f}" for x, y in points
    )
    line = f'<polyline points="{path}" fill="none" stroke="{_LINE_COLOUR}" stroke-width="1.5"/>'
    return _svg(_WIDTH, _HEIGHT, _axes(title, x_range, y_range) + line)


def score_histogram(scores: list[tuple[int, float]]) -> str:
    """Image scores of good and defective test images over each other; scores are (label, score)."""
    low, high = min(score for _, score in scores), max(score for _, score in scores)
    counts = {0: [0] * _BINS, 1: [0] * _BINS}
    for label, score in scores:
        counts[label][min(_BINS - 1, int(place(score, low, high, 0, _BINS)))] += 1
    top, bottom = max(map(max, counts.values())), _HEIGHT - _BOTTOM
    width = (_WIDTH - 10 - _LEFT) / _BINS
    bars = "".join(
        f'<rect x="{_LEFT + index * width:.1f}" y="{place(count, 0, top, bottom, _TOP):.1f}" width="{width:.1f}" '
        f'height="{bottom - place(count, 0, top, bottom, _TOP):.1f}" fill="{colour}" fill-opacity="0.55"/>'
        for label, colour in ((0, _GOOD_COLOUR), (1, _DEFECTIVE_COLOUR))
        for index, count in enumerate(counts[label])
        if count
    )
    return _svg(_WIDTH, _HEIGHT, _axes("test images by score: blue good, red defective", (low, high), (0, top)) + bars)


def scatter(title: str, x_label: str, y_label: str, points: Sequence[Point]) -> str:
    """Labelled points; the labels stand in a column to the right, in the points' order from above, so that none overlap.

    The x axis starts at 0, the y axis is cut to the points' range.
    """
    x_ticks = ticks(0.0, max(point.x for point in points))
    y_ticks = ticks(min(point.y - point.spread for point in points), max(point.y + point.spread for point in points))
    right = _SCATTER_LEFT + _SCATTER_PLOT_WIDTH
    height = max(_SCATTER_LEAST_HEIGHT, _SCATTER_TOP + _SCATTER_BOTTOM + len(points) * _LABEL_HEIGHT)
    bottom = height - _SCATTER_BOTTOM

    def place_x(value: float) -> float:
        return place(value, x_ticks[0], x_ticks[-1], _SCATTER_LEFT, right)

    def place_y(value: float) -> float:
        return place(value, y_ticks[0], y_ticks[-1], bottom, _SCATTER_TOP)

    frame = _frame(title, x_label, y_label, [(place_x(v), v) for v in x_ticks], [(place_y(v), v) for v in y_ticks], bottom)
    ordered = sorted(points, key=lambda point: (-point.y, -point.x))
    rows = spaced([place_y(point.y) for point in ordered], _LABEL_HEIGHT, _SCATTER_TOP, bottom)
    marks = []
    for point, row in zip(ordered, rows, strict=True):
        x, y = place_x(point.x), place_y(point.y)
        start, text = right + _LABEL_GAP - 4, html.escape(point.label)
        marks.append(f'<polyline points="{x:.1f},{y:.1f} {right + 4},{row:.1f} {start},{row:.1f}" fill="none" stroke="#ccc"/>')
        if point.spread:
            low, high = place_y(point.y - point.spread), place_y(point.y + point.spread)
            marks.append(f'<path d="M{x:.1f} {low:.1f}V{high:.1f}" stroke="{point.colour}" stroke-width="2"/>')
        marks.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{point.colour}"/>')
        marks.append(_text(right + _LABEL_GAP, row + 4, "start", text, _LABEL_SIZE))
    widest = max(len(point.label) for point in points)
    return _svg(right + _LABEL_GAP + math.ceil(widest * _CHARACTER_WIDTH) + 8, height, frame + "".join(marks))


def place(value: float, low: float, high: float, start: float, end: float) -> float:
    """Where a value of low..high lies in start..end; a range without extent counts as 1 wide."""
    return start + (value - low) / ((high - low) or 1) * (end - start)


def ticks(low: float, high: float) -> list[float]:
    """About five round numbers in equal steps of 1, 2 or 5 times a power of ten, that enclose low..high."""
    span = (high - low) or abs(high) / 100 or 1.0
    power = 10.0 ** math.floor(math.log10(span / (_TICKS - 1)))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power * (_TICKS - 1) >= span * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, max(last, first + 1) + 1)]


def spaced(rows: list[float], gap: float, top: float, bottom: float) -> list[float]:
    """Ascending rows moved so that they lie at least `gap` apart, between top and bottom if they fit there."""
    placed: list[float] = []
    for row in rows:
        placed.append(max(row, placed[-1] + gap if placed else top))
    limit = bottom
    for index in reversed(range(len(placed))):
        placed[index] = min(placed[index], limit)
        limit = placed[index] - gap
    return placed


def _frame(
    title: str,
    x_label: str,
    y_label: str,
    x_ticks: list[tuple[float, float]],
    y_ticks: list[tuple[float, float]],
    bottom: float,
) -> str:
    """Axes with ticks (position, value), their names, and grid lines."""
    right, middle = _SCATTER_LEFT + _SCATTER_PLOT_WIDTH, (bottom + _SCATTER_TOP) / 2
    parts = [f'<path d="M{_SCATTER_LEFT} {_SCATTER_TOP}V{bottom}H{right}" fill="none" stroke="#999"/>']
    for position, value in x_ticks:
        parts.append(f'<path d="M{position:.1f} {bottom}v4" stroke="#999"/>')
        parts.append(_text(position, bottom + 16, "middle", f"{value:g}", _LABEL_SIZE))
    for position, value in y_ticks:
        parts.append(f'<path d="M{_SCATTER_LEFT} {position:.1f}H{right}" stroke="#e4e4e4"/>')
        parts.append(_text(_SCATTER_LEFT - 6, position + 4, "end", f"{value:g}", _LABEL_SIZE))
    parts.append(_text(_SCATTER_LEFT, 16, "start", html.escape(title), 12))
    parts.append(_text((_SCATTER_LEFT + right) / 2, bottom + 34, "middle", html.escape(x_label), _LABEL_SIZE))
    turned = f'transform="rotate(-90 14 {middle:.1f})"'
    parts.append(
        f'<text x="14" y="{middle:.1f}" text-anchor="middle" font-size="{_LABEL_SIZE}" {turned}>{html.escape(y_label)}</text>'
    )
    return "".join(parts)


def _axes(title: str, x_range: tuple[float, float], y_range: tuple[float, float]) -> str:
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - 10
    labels = (
        (_LEFT, _HEIGHT - 8, "start", f"{x_range[0]:.4g}"),
        (right, _HEIGHT - 8, "end", f"{x_range[1]:.4g}"),
        (_LEFT - 4, bottom, "end", f"{y_range[0]:.3g}"),
        (_LEFT - 4, 34, "end", f"{y_range[1]:.3g}"),
        (_LEFT, 16, "start", html.escape(title)),
    )
    text = "".join(_text(x, y, anchor, label, 12) for x, y, anchor, label in labels)
    return f'<path d="M{_LEFT} {_TOP}V{bottom}H{right}" fill="none" stroke="#999"/>{text}'


def _text(x: float, y: float, anchor: str, text: str, size: int) -> str:
    """`text` is already escaped."""
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" font-size="{size}">{text}</text>'


def _svg(width: float, height: float, content: str) -> str:
    return f'<svg width="{width:g}" height="{height:g}" role="img" font-family="sans-serif">{content}</svg>'
