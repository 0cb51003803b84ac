"""The chart of scaling efficiency over machine size, as a self-contained SVG file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from xml.etree import ElementTree as Xml

from graphopt.render.svg import FAINT, INK, colour, finished, line, page, text

WIDTH, HEIGHT = 790, 456
LEFT, RIGHT, TOP, BOTTOM = 68, 172, 88, 60
TICKS_WANTED = 8
LABEL_GAP = 16

Series = Mapping[str, Sequence[tuple[int, float]]]


def efficiency_chart(title: str, subtitle: str, series: Series) -> str:
    """A line per series over the number of ranks, which is on a logarithmic axis.

    Args:
        title: the first line.
        subtitle: smaller, below it; two lines where it is long.
        series: by name, ``(ranks, efficiency)`` with efficiencies from 0 to 1; at least one point.

    Raises:
        ValueError: there is no point, or one has less than one rank.
    """
    every = [point for points in series.values() for point in points]
    if not every or min(world for world, _ in every) < 1:
        raise ValueError("a chart needs points of one rank or more")
    axes = _Axes(every)
    root = page(WIDTH, HEIGHT, LEFT, title, subtitle)
    _draw_axes(root, axes)
    for index, (name, points) in enumerate(series.items()):
        _draw_series(root, axes, name, points, colour(index))
    _label_series(root, axes, series)
    return finished(root)


class _Axes:
    """Maps ranks and efficiencies to coordinates."""

    def __init__(self, points: Sequence[tuple[int, float]]) -> None:
        self.first = min(world for world, _ in points)
        self.last = max(world for world, _ in points)
        lowest = min(efficiency for _, efficiency in points)
        # The axis starts at the multiple of 10 % below all points: if it always started at 0, most
        # charts would be a line along the upper edge.
        self.floor = max(0.0, min(0.9, math.floor(lowest * 10 - 1e-9) / 10))

    def x(self, world: int) -> float:
        span = math.log2(self.last / self.first)
        share = math.log2(world / self.first) / span if span else 0.5
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(self, efficiency: float) -> float:
        share = (1 - efficiency) / (1 - self.floor)
        return TOP + share * (HEIGHT - TOP - BOTTOM)

    def worlds(self) -> list[int]:
        """Ticks: powers of two, thinned out evenly, and the last world."""
        low, high = math.ceil(math.log2(self.first)), math.floor(math.log2(self.last))
        stride = max(1, math.ceil((high - low + 1) / TICKS_WANTED))
        ticks = [2**power for power in range(low, high + 1, stride)]
        # The label of the largest machine matters most: keep others away from it.
        return [t for t in ticks if self.x(self.last) - self.x(t) >= 44] + [self.last]

    def efficiencies(self) -> list[float]:
        step = 0.1 if self.floor < 0.75 else 0.02
        count = round((1 - self.floor) / step)
        return [1 - step * index for index in range(count + 1)]


def _draw_axes(root: Xml.Element, axes: _Axes) -> None:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    for efficiency in axes.efficiencies():
        y = axes.y(efficiency)
        line(root, (LEFT, y), (right, y), FAINT)
        text(root, LEFT - 8, y + 4, f"{100 * efficiency:.0f} %", size=12, anchor="end")
    for world in axes.worlds():
        x = axes.x(world)
        line(root, (x, bottom), (x, bottom + 5), INK)
        text(root, x, bottom + 20, f"{world:,}", size=12, anchor="middle")
    line(root, (LEFT, bottom), (right, bottom), INK)
    middle = (LEFT + right) / 2
    text(root, middle, HEIGHT - 16, "ranks (logarithmic)", size=13, anchor="middle")
    height = (TOP + bottom) / 2
    label = "scaling efficiency"
    if axes.floor > 0:  # a cut axis makes small differences look large
        label += f", from {100 * axes.floor:.0f} %"
    turned = text(root, 16, height, label, size=13, anchor="middle")
    turned.set("transform", f"rotate(-90 16 {height:.1f})")


def _draw_series(
    root: Xml.Element, axes: _Axes, name: str, points: Sequence[tuple[int, float]], stroke: str
) -> None:
    places = [(axes.x(world), axes.y(efficiency)) for world, efficiency in points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    style = {"fill": "none", "stroke": stroke, "stroke-width": "2"}
    Xml.SubElement(root, "polyline", {"points": path, **style})
    for (x, y), (world, efficiency) in zip(places, points, strict=True):
        dot = {"cx": f"{x:.1f}", "cy": f"{y:.1f}", "r": "3.5", "fill": stroke}
        circle = Xml.SubElement(root, "circle", dot)
        tip = f"{name}: {100 * efficiency:.2f} % at {world:,} ranks"
        Xml.SubElement(circle, "title").text = tip


def _label_series(root: Xml.Element, axes: _Axes, series: Series) -> None:
    """The name and the last efficiency of each line at its end, pushed apart where they meet."""
    ends = [
        (axes.y(points[-1][1]), f"{name} {100 * points[-1][1]:.1f} %", index, points[-1][0])
        for index, (name, points) in enumerate(series.items())
        if points
    ]
    below = -math.inf
    for y, label, index, world in sorted(ends):
        below = max(y + 4, below + LABEL_GAP)
        text(root, axes.x(world) + 10, below, label, size=12, weight="bold", fill=colour(index))
