"""The front of time and change of the loss, as a self-contained SVG file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from xml.etree import ElementTree as Xml

from graphopt.passbase import Row
from graphopt.render.svg import FAINT, INK, colour, finished, line, page, text
from graphopt.render.units import duration

WIDTH, HEIGHT = 640, 420
LEFT, RIGHT, TOP, BOTTOM = 84, 40, 84, 62
TICKS = 5


def front_chart(name: str, spec: str, front: Sequence[Row]) -> str:
    """The choices as points: seconds to the right, change of the loss upwards, logarithmic.

    Args:
        name: of the model.
        spec: of the pass.
        front: rows with ``seconds``, ``change`` and ``chosen``, fastest first; a change of 0 is
            drawn on the lower edge.

    Raises:
        ValueError: there is no point.
    """
    points = [(_number(p["seconds"]), _number(p["change"]), bool(p["chosen"])) for p in front]
    if not points:
        raise ValueError("a chart needs a point")
    axes = _Axes([s for s, _, _ in points], [c for _, c, _ in points])
    words = f"{spec}; each point is a choice of formats, the filled one is taken"
    root = page(WIDTH, HEIGHT, LEFT, f"Time against change of the loss: {name}", words)
    axes.draw(root)
    places = [(axes.x(seconds), axes.y(change)) for seconds, change, _ in points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    style = {"fill": "none", "stroke": colour(0), "stroke-width": "1.5"}
    Xml.SubElement(root, "polyline", {"points": path, **style})
    for (x, y), (seconds, change, chosen) in zip(places, points, strict=True):
        dot = {"cx": f"{x:.1f}", "cy": f"{y:.1f}", "r": "6" if chosen else "3.5"}
        fill = {"fill": colour(1) if chosen else "#ffffff", "stroke": colour(1 if chosen else 0)}
        circle = Xml.SubElement(root, "circle", {**dot, **fill})
        Xml.SubElement(circle, "title").text = f"{duration(seconds)}, change {change:.3g}"
    return finished(root)


class _Axes:
    """Maps seconds and changes to coordinates."""

    def __init__(self, seconds: Sequence[float], changes: Sequence[float]) -> None:
        low, high = min(seconds), max(seconds)
        margin = 0.06 * (high - low) or 0.1 * high or 1.0
        self.first, self.last = low - margin, high + margin
        known = [math.log10(c) for c in changes if c > 0] or [0.0]
        self.floor = math.floor(min(known)) - 1
        self.ceiling = max(math.ceil(max(known)), self.floor + 2)

    def x(self, seconds: float) -> float:
        share = (seconds - self.first) / (self.last - self.first)
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(self, change: float) -> float:
        height = math.log10(change) if change > 0 else self.floor
        share = (self.ceiling - max(height, self.floor)) / (self.ceiling - self.floor)
        return TOP + share * (HEIGHT - TOP - BOTTOM)

    def draw(self, root: Xml.Element) -> None:
        bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
        stride = max(1, math.ceil((self.ceiling - self.floor) / TICKS))
        for power in range(self.ceiling, self.floor, -stride):
            y = self.y(10.0**power)
            line(root, (LEFT, y), (right, y), FAINT)
            text(root, LEFT - 8, y + 4, f"1e{power}", size=12, anchor="end")
        text(root, LEFT - 8, bottom + 4, "0", size=12, anchor="end")
        line(root, (LEFT, bottom), (right, bottom), INK)
        for index in range(TICKS):
            seconds = self.first + (index + 0.5) / TICKS * (self.last - self.first)
            x = self.x(seconds)
            line(root, (x, bottom), (x, bottom + 5), INK)
            text(root, x, bottom + 20, duration(seconds), size=12, anchor="middle")
        middle, height = (LEFT + right) / 2, (TOP + bottom) / 2
        words = "time of all operators that can be lowered, and of casts"
        text(root, middle, HEIGHT - 16, words, size=13, anchor="middle")
        turned = text(root, 20, height, "expected change of the loss", size=13, anchor="middle")
        turned.set("transform", f"rotate(-90 20 {height:.1f})")


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else 0.0
