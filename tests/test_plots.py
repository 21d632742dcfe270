"""Plots: where points, ticks and labels lie, against places computed by hand."""

import itertools
import re

import pytest

from utils.plots import Point, loss_curve, scatter, score_histogram, spaced, ticks

# the frame of a scatter plot with few points
LEFT, RIGHT, TOP, BOTTOM = 58, 418, 30, 216


def circles(svg: str) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', svg)]


def labels(svg: str, first: str) -> list[tuple[float, float, str]]:
    found = re.findall(r'<text x="([\d.]+)" y="([\d.]+)" text-anchor="start" font-size="11">([^<]*)<', svg)
    return [(float(x), float(y), text) for x, y, text in found if text.startswith(first)]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 274.1, [0, 100, 200, 300]),
        (0, 400, [0, 100, 200, 300, 400]),
        (98.6, 99.5, [98.5, 99, 99.5]),
        (0.31, 0.329, [0.31, 0.315, 0.32, 0.325, 0.33]),
        (100, 100, [100, 100.5]),
        (0, 0, [0, 0.5]),
    ],
)
def test_ticks_are_round_and_enclose_the_values(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)


def test_labels_keep_their_distance_and_stay_inside():
    assert spaced([50, 90], 15, 30, 216) == [50, 90]
    assert spaced([50, 50, 52, 120], 15, 30, 216) == [50, 65, 80, 120]
    assert spaced([200, 210, 216], 15, 30, 216) == [186, 201, 216]
    assert spaced([10, 10], 15, 30, 216) == [30, 45]


def test_points_lie_where_their_values_say():
    svg = scatter("title", "MB", "I-AUROC, %", [Point("a", 100, 98.5, "#111"), Point("<b>", 400, 99.5, "#222", spread=0.25)])
    # x axis 0..400, y axis 98.5..100 because of the bar up to 99.75
    assert circles(svg) == [
        (RIGHT, pytest.approx(BOTTOM - (BOTTOM - TOP) * 2 / 3, abs=0.06)),
        (LEFT + (RIGHT - LEFT) / 4, BOTTOM),
    ]
    low, high = (BOTTOM - (BOTTOM - TOP) * share for share in (0.75 / 1.5, 1.25 / 1.5))
    assert f'<path d="M{RIGHT:.1f} {low:.1f}V{high:.1f}" stroke="#222"' in svg
    assert "&lt;b&gt;" in svg
    assert "<b>" not in svg
    for tick in ("0", "100", "400", "98.5", "100"):
        assert f">{tick}</text>" in svg
    assert ">MB</text>" in svg
    assert ">I-AUROC, %</text>" in svg


def test_labels_of_many_equal_points_do_not_overlap_and_fit_into_the_picture():
    points = [Point(f"run-{index}-{'x' * 30}", 55.0, 99.0 - index / 1000, "#111") for index in range(20)]
    svg = scatter("title", "MB", "%", points)
    width, height = map(float, re.search(r'<svg width="([\d.]+)" height="([\d.]+)"', svg).groups())
    found = labels(svg, "run-")
    assert [text for _, _, text in found] == [point.label for point in points]
    rows = [y for _, y, _ in found]
    assert min(after - before for before, after in itertools.pairwise(rows)) >= 14.9
    assert max(rows) < height
    assert all(x > RIGHT and x + 6 * len(text) < width for x, _, text in found)


def test_a_loss_curve_starts_at_the_top_left_and_ends_where_the_loss_ends():
    svg = loss_curve("loss", [(10, 2.0), (20, 0.0), (30, 1.0)])
    assert '<polyline points="52.0,24.0 251.0,192.0 450.0,108.0"' in svg


def test_a_histogram_counts_scores_by_label():
    svg = score_histogram([(0, 0.0), (0, 0.0), (1, 0.0), (1, 1.0)])
    bars = re.findall(r'<rect x="([\d.]+)" y="([\d.]+)" width="[\d.]+" height="([\d.]+)" fill="(#\w+)"', svg)
    bottom, whole = 192.0, 168.0
    assert [(float(x), float(y), float(height), colour) for x, y, height, colour in bars] == [
        (52.0, bottom - whole, whole, "#4878a8"),
        (52.0, bottom - whole / 2, whole / 2, "#d1495b"),
        (pytest.approx(450 - 398 / 40, abs=0.1), bottom - whole / 2, whole / 2, "#d1495b"),
    ]
