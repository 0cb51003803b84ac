"""Horizontal bars with their intervals, in groups, as a self-contained SVG file."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from xml.etree import ElementTree as Xml

from graphopt.render.svg import FAINT, INK, colour, finished, line, page, text

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 800, 240, 160, 76, 56
BAR, GAP, HEADING = 18, 6, 30


@dataclass(frozen=True)
class Bar:
    """One value.

    Attributes:
        label: what it belongs to.
        value: zero or more.
        low: lower end of its interval.
        high: upper end.
    """

    label: str
    value: float
    low: float
    high: float


def bar_chart(title: str, subtitle: str, axis: str, groups: Mapping[str, Sequence[Bar]]) -> str:
    """Groups of bars below each other; equal labels have equal colours.

    Args:
        title: the first line.
        subtitle: smaller, below it; two lines where it is long.
        axis: what the values are, with their unit.
        groups: by heading, from top to bottom.

    Raises:
        ValueError: there is no bar, or a value is negative or not finite.
    """
    bars = [bar for group in groups.values() for bar in group]
    ends = [end for bar in bars for end in (bar.value, bar.low, bar.high)]
    if not bars or not all(math.isfinite(end) and end >= 0 for end in ends):
        raise ValueError("a chart needs bars with values of zero or more")
    rows = len(bars) * (BAR + GAP) + len(groups) * HEADING
    height = TOP + rows + BOTTOM
    step, top = _ticks(max(ends))
    root = page(WIDTH, height, 24, title, subtitle)

    def x(value: float) -> float:
        return LEFT + value / top * (WIDTH - LEFT - RIGHT)

    for tick in range(round(top / step) + 1):
        place = x(tick * step)
        line(root, (place, TOP), (place, TOP + rows), FAINT)
        text(root, place, TOP + rows + 18, f"{tick * step:.4g}", size=12, anchor="middle")
    text(root, x(top / 2), height - 14, axis, size=13, anchor="middle")
    labels = list(dict.fromkeys(bar.label for bar in bars))
    y = float(TOP)
    for heading, group in groups.items():
        text(root, 24, y + 20, heading, size=13, weight="bold")
        y += HEADING
        for bar in group:
            _draw(root, bar, colour(labels.index(bar.label)), x, y)
            y += BAR + GAP
    return finished(root)


def _draw(root: Xml.Element, bar: Bar, fill: str, x: Callable[[float], float], y: float) -> None:
    middle = y + BAR / 2
    place = {"x": f"{x(0):.1f}", "y": f"{y:.1f}", "width": f"{x(bar.value) - x(0):.1f}"}
    Xml.SubElement(root, "rect", {**place, "height": str(BAR), "fill": fill})
    text(root, LEFT - 8, middle + 4, bar.label, size=12, anchor="end")
    words = f"{bar.value:.3f}"
    if bar.low < bar.high:
        words += f" ({bar.low:.2f} to {bar.high:.2f})"
        line(root, (x(bar.low), middle), (x(bar.high), middle), INK)
        for end in (bar.low, bar.high):
            line(root, (x(end), middle - 4), (x(end), middle + 4), INK)
    # In a separate column, where no grid line crosses them.
    text(root, WIDTH - RIGHT + 12, middle + 4, words, size=12)


def _ticks(highest: float) -> tuple[float, float]:
    """Distance of the ticks, 1, 2 or 5 times a power of ten, and where the axis ends."""
    if highest <= 0:
        return 1.0, 1.0
    power = 10.0 ** math.floor(math.log10(highest))
    step = next(part * power for part in (0.2, 0.5, 1.0, 2.0) if highest <= 6 * part * power)
    return step, step * math.ceil(highest / step - 1e-9)
