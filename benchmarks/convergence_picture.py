"""A picture of values over training steps: one line per method, and the target."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as Xml

from graphopt.render.svg import FAINT, INK, colour, finished, line, page, text

WIDTH, HEIGHT = 790, 456
LEFT, RIGHT, TOP, BOTTOM = 68, 192, 100, 60
LABEL_GAP = 32  # two lines each
SHOWN = 0.92  # of all values lie within the picture; the first steps are far off


@dataclass(frozen=True)
class Curve:
    """One line.

    Attributes:
        points: steps done and the value then; at least one.
        note: a few words below its name.
    """

    points: Sequence[tuple[int, float]]
    note: str


UNITS = {"digits": "validation accuracy", "characters": "validation loss, nats per character"}


def draw(results: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write a picture per task, from what `benchmarks.convergence` has kept."""
    folder.mkdir(exist_ok=True)
    written = []
    for name, task in results.items():
        lines = {
            method: Curve(
                [(step, value) for step, value in found["curve"] if math.isfinite(value)],
                _steps(found),
            )
            for method, found in task["methods"].items()
        }
        subtitle = (
            "The middle one of five trainings per method, as tuned; beside the name, steps to "
            f"{task['target']:g}: median (lowest to highest)."
        )
        path = folder / f"convergence_{name}.svg"
        path.write_text(
            curves(f"Steps to a target: {name}", subtitle, UNITS[name], lines, task["target"])
        )
        written.append(path)
    return written


def _steps(found: Mapping[str, Any]) -> str:
    median, low, high = (
        "never" if found["steps"][part] is None else f"{found['steps'][part]:.0f}"
        for part in ("median", "low", "high")
    )
    return f"{median} ({low} to {high})"


def curves(title: str, subtitle: str, unit: str, series: Mapping[str, Curve], target: float) -> str:
    """The text of an SVG file.

    Args:
        title: the first line.
        subtitle: smaller, below it.
        unit: name of the vertical axis.
        series: the lines by name.
        target: a dashed line across the picture.

    Raises:
        ValueError: there is no series, or one has no points.
    """
    if not series or any(not curve.points for curve in series.values()):
        raise ValueError("a picture needs lines of one point or more")
    axes = _Axes([p for curve in series.values() for p in curve.points], target)
    root = page(WIDTH, HEIGHT, LEFT, title, subtitle)
    _draw_axes(root, axes, unit)
    left, right, y = LEFT, WIDTH - RIGHT, axes.y(target)
    ends = {"x1": f"{left}", "y1": f"{y:.1f}", "x2": f"{right}", "y2": f"{y:.1f}"}
    Xml.SubElement(root, "line", {**ends, "stroke": INK, "stroke-dasharray": "5 4"})
    text(root, left + 6, y - 5, f"target {target:g}", size=12)
    for index, curve in enumerate(series.values()):
        inside = [axes.low <= value <= axes.high for _, value in curve.points]
        # From the last point before the line enters the picture; the ones before say nothing.
        begin = max(0, inside.index(True) - 1) if any(inside) else 0
        shown = curve.points[begin:]
        path = " ".join(f"{axes.x(step):.1f},{axes.y(value):.1f}" for step, value in shown)
        style = {"fill": "none", "stroke": colour(index), "stroke-width": "2"}
        Xml.SubElement(root, "polyline", {"points": path, **style})
    _name(root, axes, series)
    return finished(root)


class _Axes:
    """From steps and values to places in the picture."""

    def __init__(self, points: Sequence[tuple[int, float]], target: float) -> None:
        self.last = max(step for step, _ in points)
        values = sorted([*(value for _, value in points), target])
        cut = int((1 - SHOWN) * len(values))
        # Rising curves begin far below the others, falling ones far above.
        rising = target > values[len(values) // 2] or values[-1] - target < target - values[0]
        low, high = (values[cut], values[-1]) if rising else (values[0], values[-1 - cut])
        low, high = min(low, target), max(high, target)
        self.step = _round_step((high - low) / 6) if high > low else 1.0
        self.low = math.floor(low / self.step + 1e-9) * self.step
        self.high = math.ceil(high / self.step - 1e-9) * self.step
        if self.high <= self.low:
            self.high = self.low + self.step

    def x(self, step: int) -> float:
        return LEFT + step / self.last * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        share = (self.high - value) / (self.high - self.low)
        # What is off the picture runs along its edge.
        return TOP + min(1.0, max(0.0, share)) * (HEIGHT - TOP - BOTTOM)

    def values(self) -> list[float]:
        """Ticks."""
        return [
            self.low + self.step * k for k in range(round((self.high - self.low) / self.step) + 1)
        ]

    def steps(self) -> list[int]:
        """Ticks."""
        stride = max(1, int(_round_step(self.last / 6)))
        return list(range(0, self.last + 1, stride))


def _round_step(wanted: float) -> float:
    """The next of 1, 2, 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(wanted))
    return next(power * f for f in (1, 2, 5, 10) if power * f >= wanted * (1 - 1e-9))


def _draw_axes(root: Xml.Element, axes: _Axes, unit: str) -> None:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    digits = max(0, -math.floor(math.log10(axes.step)))
    for value in axes.values():
        y = axes.y(value)
        line(root, (LEFT, y), (right, y), FAINT)
        text(root, LEFT - 8, y + 4, f"{value:.{digits}f}", size=12, anchor="end")
    for step in axes.steps():
        x = axes.x(step)
        line(root, (x, bottom), (x, bottom + 5), INK)
        text(root, x, bottom + 20, f"{step}", size=12, anchor="middle")
    line(root, (LEFT, bottom), (right, bottom), INK)
    text(root, (LEFT + right) / 2, HEIGHT - 16, "steps", size=13, anchor="middle")
    height = (TOP + bottom) / 2
    turned = text(root, 16, height, unit, size=13, anchor="middle")
    turned.set("transform", f"rotate(-90 16 {height:.1f})")


def _name(root: Xml.Element, axes: _Axes, series: Mapping[str, Curve]) -> None:
    """Names at the ends of the lines, pushed apart where they meet."""
    ends = sorted((axes.y(c.points[-1][1]), i, name) for i, (name, c) in enumerate(series.items()))
    # As many as there are have to fit above the axis.
    below = -math.inf
    places = []
    for y, _, _ in ends:
        below = max(y + 4, below + LABEL_GAP)
        places.append(below)
    over = max(0.0, places[-1] + 14 - (HEIGHT - BOTTOM))
    x = WIDTH - RIGHT + 10
    for (_, index, name), place in zip(ends, places, strict=True):
        text(root, x, place - over, name, size=12, weight="bold", fill=colour(index))
        text(root, x, place - over + 14, series[name].note, size=11)
