"""The chart of scaling efficiency over machine size, as a self-contained SVG file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from xml.etree import ElementTree as Xml

WIDTH, HEIGHT = 760, 440
LEFT, RIGHT, TOP, BOTTOM = 64, 150, 72, 60
COLOURS = ("#1f6feb", "#d1570a", "#2d7d46", "#7a4fbf")
INK, FAINT = "#24292f", "#d8dee4"
TICKS_WANTED = 8
LABEL_GAP = 16

Series = Mapping[str, Sequence[tuple[int, float]]]


def efficiency_chart(title: str, subtitle: str, series: Series) -> str:
    """A line per series over the number of ranks, which is on a logarithmic axis.

    Args:
        title: the first line.
        subtitle: the second, smaller one.
        series: by name, ``(ranks, efficiency)`` with efficiencies from 0 to 1; at least one point.

    Raises:
        ValueError: there is no point, or one has less than one rank.
    """
    points = [point for line in series.values() for point in line]
    if not points or min(world for world, _ in points) < 1:
        raise ValueError("a chart needs points of one rank or more")
    axes = _Axes(points)
    size = {"width": str(WIDTH), "height": str(HEIGHT), "viewBox": f"0 0 {WIDTH} {HEIGHT}"}
    root = Xml.Element(
        "svg",
        {"xmlns": "http://www.w3.org/2000/svg", **size, "font-family": "sans-serif", "fill": INK},
    )
    Xml.SubElement(root, "title").text = title
    Xml.SubElement(root, "rect", {"width": "100%", "height": "100%", "fill": "#ffffff"})
    _text(root, LEFT, 28, title, size=17, weight="bold")
    _text(root, LEFT, 50, subtitle, size=12)
    _draw_axes(root, axes)
    for (name, line), colour in zip(series.items(), _colours(len(series)), strict=True):
        _draw_line(root, axes, name, line, colour)
    _label_lines(root, axes, series)
    Xml.indent(root)
    return Xml.tostring(root, encoding="unicode") + "\n"


class _Axes:
    """From ranks and efficiencies to places in the picture."""

    def __init__(self, points: Sequence[tuple[int, float]]) -> None:
        self.first = min(world for world, _ in points)
        self.last = max(world for world, _ in points)
        lowest = min(efficiency for _, efficiency in points)
        # Down to the ten per cent below all points: a chart that always began at 0 would show
        # nothing but a line along its upper edge.
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
        # The label of the largest machine matters most; it gets its room.
        return [t for t in ticks if self.x(self.last) - self.x(t) >= 44] + [self.last]

    def efficiencies(self) -> list[float]:
        step = 0.1 if self.floor < 0.75 else 0.02
        count = round((1 - self.floor) / step)
        return [1 - step * index for index in range(count + 1)]


def _draw_axes(root: Xml.Element, axes: _Axes) -> None:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    for efficiency in axes.efficiencies():
        y = axes.y(efficiency)
        _line(root, (LEFT, y), (right, y), FAINT)
        _text(root, LEFT - 8, y + 4, f"{100 * efficiency:.0f} %", size=12, anchor="end")
    for world in axes.worlds():
        x = axes.x(world)
        _line(root, (x, bottom), (x, bottom + 5), INK)
        _text(root, x, bottom + 20, f"{world:,}", size=12, anchor="middle")
    _line(root, (LEFT, bottom), (right, bottom), INK)
    middle = (LEFT + right) / 2
    _text(root, middle, HEIGHT - 16, "ranks (logarithmic)", size=13, anchor="middle")
    height = (TOP + bottom) / 2
    turned = _text(root, 16, height, "scaling efficiency", size=13, anchor="middle")
    turned.set("transform", f"rotate(-90 16 {height:.1f})")


def _draw_line(
    root: Xml.Element, axes: _Axes, name: str, line: Sequence[tuple[int, float]], colour: str
) -> None:
    places = [(axes.x(world), axes.y(efficiency)) for world, efficiency in line]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    style = {"fill": "none", "stroke": colour, "stroke-width": "2"}
    Xml.SubElement(root, "polyline", {"points": path, **style})
    for (x, y), (world, efficiency) in zip(places, line, strict=True):
        dot = {"cx": f"{x:.1f}", "cy": f"{y:.1f}", "r": "3.5", "fill": colour}
        circle = Xml.SubElement(root, "circle", dot)
        tip = f"{name}: {100 * efficiency:.2f} % at {world:,} ranks"
        Xml.SubElement(circle, "title").text = tip


def _label_lines(root: Xml.Element, axes: _Axes, series: Series) -> None:
    """The name and the last efficiency of each line at its end, pushed apart where they meet."""
    colours = _colours(len(series))
    ends = [
        (axes.y(line[-1][1]), f"{name} {100 * line[-1][1]:.1f} %", colour, axes.x(line[-1][0]))
        for (name, line), colour in zip(series.items(), colours, strict=True)
        if line
    ]
    below = -math.inf
    for y, label, colour, x in sorted(ends):
        below = max(y + 4, below + LABEL_GAP)
        _text(root, x + 10, below, label, size=12, weight="bold", colour=colour)


def _colours(count: int) -> list[str]:
    return [COLOURS[index % len(COLOURS)] for index in range(count)]


def _line(
    root: Xml.Element, start: tuple[float, float], end: tuple[float, float], colour: str
) -> None:
    (x1, y1), (x2, y2) = start, end
    places = {"x1": f"{x1:.1f}", "y1": f"{y1:.1f}", "x2": f"{x2:.1f}", "y2": f"{y2:.1f}"}
    Xml.SubElement(root, "line", {**places, "stroke": colour})


def _text(
    root: Xml.Element,
    x: float,
    y: float,
    words: str,
    *,
    size: int,
    anchor: str = "start",
    weight: str = "normal",
    colour: str = INK,
) -> Xml.Element:
    place = {"x": f"{x:.1f}", "y": f"{y:.1f}", "font-size": str(size), "fill": colour}
    element = Xml.SubElement(root, "text", {**place, "text-anchor": anchor, "font-weight": weight})
    element.text = words
    return element
