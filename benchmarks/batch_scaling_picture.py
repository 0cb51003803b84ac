"""A picture of steps to a target over the batch size: one line per method, both axes by factors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any
from xml.etree import ElementTree as Xml

from examples.kfac_digits.comparison import METHODS
from graphopt.render.svg import FAINT, INK, colour, finished, line, page, text

WIDTH, HEIGHT = 790, 456
LEFT, RIGHT, TOP, BOTTOM = 68, 150, 100, 60
LABEL_GAP = 18
TITLE = "Steps to 98 % of unseen digits, by batch size"
SUBTITLE = (
    "Medians of five trainings, lowest to highest; each point is tuned for itself. Dashed: half "
    "the steps for twice the batch."
)


def steps_over_batch(results: Mapping[str, Mapping[str, Any]]) -> str:
    """The text of an SVG file.

    Args:
        results: by method and batch size, what `benchmarks.batch_scaling` has kept. Cells whose
            median run never reached the target are left out.

    Raises:
        ValueError: no cell has reached the target.
    """
    lines = {
        method: {int(size): c["steps"] for size, c in cells.items() if c["steps"]["median"]}
        for method, cells in results.items()
    }
    lines = {method: points for method, points in lines.items() if points}
    if not lines:
        raise ValueError("a picture needs a method that reaches the target")
    axes = _Axes(lines)
    root = page(WIDTH, HEIGHT, LEFT, TITLE, SUBTITLE)
    _draw_axes(root, axes)
    first = max(
        (points[axes.sizes[0]]["median"] for points in lines.values() if axes.sizes[0] in points),
        default=axes.high,
    )
    ideal = [(size, first * axes.sizes[0] / size) for size in axes.sizes]
    _polyline(root, axes, ideal, INK, {"stroke-dasharray": "5 4"})
    ends = []
    for place, (method, points) in enumerate(lines.items()):
        ink = colour(METHODS.index(method))  # as in the pictures of `benchmarks.convergence`
        medians = [(size, points[size]["median"]) for size in sorted(points)]
        _polyline(root, axes, medians, ink, {"stroke-width": "2"})
        for size, steps in sorted(points.items()):
            # Side by side, so that ranges can be told apart.
            x = axes.x(size) + 3 * (place - (len(lines) - 1) / 2)
            low, high = axes.y(steps["low"]), axes.y(steps["high"] or axes.high)
            line(root, (x, low), (x, high), ink)
        ends.append((axes.y(medians[-1][1]), method, ink))
    below = -math.inf
    for y, method, ink in sorted(ends):
        below = max(y + 4, below + LABEL_GAP)
        x = WIDTH - RIGHT + 12
        text(root, x, below, method, size=12, weight="bold", fill=ink)
    return finished(root)


class _Axes:
    """From batch sizes and steps to places in the picture."""

    def __init__(self, lines: Mapping[str, Mapping[int, Mapping[str, float | None]]]) -> None:
        spreads = [spread for points in lines.values() for spread in points.values()]
        values = [value for spread in spreads for value in spread.values() if value]
        self.sizes = sorted({size for points in lines.values() for size in points})
        # Whole powers of two.
        self.low = 2.0 ** math.floor(math.log2(min(values)))
        self.high = max(2 * self.low, 2.0 ** math.ceil(math.log2(max(values))))

    def x(self, size: int) -> float:
        ends = math.log(self.sizes[0]), math.log(self.sizes[-1])
        share = (math.log(size) - ends[0]) / (ends[1] - ends[0]) if ends[1] > ends[0] else 0.5
        return LEFT + (0.05 + 0.9 * share) * (WIDTH - LEFT - RIGHT)

    def y(self, steps: float) -> float:
        share = math.log(self.high / steps) / math.log(self.high / self.low)
        # What is off the picture runs along its edge.
        return TOP + min(1.0, max(0.0, share)) * (HEIGHT - TOP - BOTTOM)

    def ticks(self) -> list[int]:
        doublings = round(math.log2(self.high / self.low))
        return [round(self.low * 2**k) for k in range(doublings + 1)]


def _draw_axes(root: Xml.Element, axes: _Axes) -> None:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    for steps in axes.ticks():
        y = axes.y(steps)
        line(root, (LEFT, y), (right, y), FAINT)
        text(root, LEFT - 8, y + 4, f"{steps}", size=12, anchor="end")
    line(root, (LEFT, bottom), (right, bottom), INK)
    for size in axes.sizes:
        line(root, (axes.x(size), bottom), (axes.x(size), bottom + 5), INK)
        text(root, axes.x(size), bottom + 20, f"{size}", size=12, anchor="middle")
    text(root, (LEFT + right) / 2, HEIGHT - 16, "examples in a batch", size=13, anchor="middle")
    height = (TOP + bottom) / 2
    turned = text(root, 16, height, "steps", size=13, anchor="middle")
    turned.set("transform", f"rotate(-90 16 {height:.1f})")


def _polyline(
    root: Xml.Element,
    axes: _Axes,
    points: list[tuple[int, float]],
    ink: str,
    style: Mapping[str, str],
) -> None:
    path = " ".join(f"{axes.x(size):.1f},{axes.y(steps):.1f}" for size, steps in points)
    Xml.SubElement(root, "polyline", {"points": path, "fill": "none", "stroke": ink, **style})
