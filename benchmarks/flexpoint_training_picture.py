"""A picture of losses over steps: one panel for each model, one line for each format."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree as Xml

from graphopt.render.svg import FAINT, INK, finished, line, page, text

WIDTH, LEFT, RIGHT, TOP = 790, 60, 130, 96
PANEL, GAP = 190, 64  # height of a panel, and what is below it
# The first line lies below all others, wide and grey; they would hide it otherwise.
STYLES = (
    {"stroke": "#b8c0c8", "stroke-width": "7"},
    {"stroke": "#d1570a", "stroke-width": "1.5"},
    {"stroke": "#2d7d46", "stroke-width": "1.5", "stroke-dasharray": "7 3"},
    {"stroke": "#7a4fbf", "stroke-width": "1.5", "stroke-dasharray": "2 3"},
    {"stroke": "#1f6feb", "stroke-width": "2"},
    {"stroke": "#0a9396", "stroke-width": "1.5", "stroke-dasharray": "5 5"},
    {"stroke": "#c1121f", "stroke-width": "1.5"},
)
Line = Sequence[tuple[int, float]]


@dataclass(frozen=True)
class Panel:
    """One model.

    Attributes:
        title: what is drawn.
        lines: steps done and the value then, by name of the format; may be empty for some.
        unit: of the steps.
    """

    title: str
    lines: Mapping[str, Line]
    unit: str


def picture(title: str, subtitle: str, panels: Sequence[Panel]) -> str:
    """The text of an SVG file.

    Raises:
        ValueError: there is no panel, or one without a line of two points.
    """
    if not panels or any(all(len(li) < 2 for li in p.lines.values()) for p in panels):
        raise ValueError("a picture needs panels with lines of two points or more")
    root = page(WIDTH, TOP + len(panels) * (PANEL + GAP), LEFT, title, subtitle)
    for index, panel in enumerate(panels):
        _draw(root, panel, TOP + index * (PANEL + GAP))
    return finished(root)


def _draw(root: Xml.Element, panel: Panel, top: float) -> None:
    points = [point for drawn in panel.lines.values() for point in drawn]
    last = max(step for step, _ in points)
    # Lines that leave the picture run along its edge: others would be flat beside them.
    usual = [value for _, value in next(iter(panel.lines.values()))]
    low = min(0.0, *usual)
    stride = _round((max(usual) - low) / 5)
    high = low + stride * math.ceil((max(usual) - low) / stride - 1e-9)

    def place(step: int, value: float) -> tuple[float, float]:
        share = min(1.0, max(0.0, (high - value) / (high - low)))
        return LEFT + step / last * (WIDTH - LEFT - RIGHT), top + share * PANEL

    digits = max(0, -math.floor(math.log10(stride)))
    text(root, LEFT, top - 8, panel.title, size=13, weight="bold")
    for k in range(round((high - low) / stride) + 1):
        _, y = place(0, low + k * stride)
        line(root, (LEFT, y), (WIDTH - RIGHT, y), FAINT)
        text(root, LEFT - 8, y + 4, f"{low + k * stride:.{digits}f}", size=11, anchor="end")
    for step in range(0, last + 1, max(1, int(_round(last / 6)))):
        x, y = place(step, low)
        line(root, (x, y), (x, y + 5), INK)
        text(root, x, y + 18, f"{step}", size=11, anchor="middle")
    line(root, (LEFT, top + PANEL), (WIDTH - RIGHT, top + PANEL), INK)
    text(root, (LEFT + WIDTH - RIGHT) / 2, top + PANEL + 34, panel.unit, size=12, anchor="middle")
    for index, (name, drawn) in enumerate(panel.lines.items()):
        style = {"fill": "none", **STYLES[index % len(STYLES)]}
        path = " ".join("{:.1f},{:.1f}".format(*place(*point)) for point in drawn)
        Xml.SubElement(root, "polyline", {"points": path, **style})
        x, y = WIDTH - RIGHT + 12, top + 12 + 22 * index
        Xml.SubElement(root, "polyline", {"points": f"{x},{y} {x + 22},{y}", **style})
        text(root, x + 28, y + 4, name, size=12)


def _round(wanted: float) -> float:
    """The next of 1, 2, 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(wanted))
    return next(power * f for f in (1, 2, 5, 10) if power * f >= wanted * (1 - 1e-9))
