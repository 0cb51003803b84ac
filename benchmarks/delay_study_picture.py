"""A picture of accuracy over delay: one line per method, with the range over seeds.

Two panels: the delays of a pipeline over the images per update, and one delay for all weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from xml.etree import ElementTree as Xml

from graphopt.render.svg import FAINT, INK, finished, line, page, text

WIDTH, HEIGHT = 900, 470
LEFT, RIGHT, TOP, BOTTOM = 64, 170, 112, 66
GAP = 70  # between the panels
PIPELINE_SHARE = 0.45  # of the width of both
COLOURS = ("#24292f", "#1f6feb", "#7a4fbf", "#2d7d46", "#b08800", "#d1570a")
LEGEND_LINE = 22
TICKS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2)


@dataclass(frozen=True)
class Spread:
    """Accuracies of several seeds.

    Attributes:
        mean: of all seeds.
        low: the least.
        high: the largest.
    """

    mean: float
    low: float
    high: float


Lines = Mapping[str, Mapping[int, Spread]]
"""By method and place on the horizontal axis."""


def accuracy_over_delay(
    title: str,
    subtitle: str,
    undelayed: tuple[Mapping[int, float], float],
    pipeline: Lines,
    constant: Lines,
) -> str:
    """The text of an SVG file.

    Args:
        title: the first line.
        subtitle: smaller, below it.
        undelayed: accuracies without delay, by images per update on the left, and on the right.
        pipeline: by method and images per update.
        constant: by method and delay.

    Raises:
        ValueError: a side has nothing to draw.
    """
    if not pipeline or not constant:
        raise ValueError("a picture needs trainings with a pipeline's delays and with one delay")
    root = page(WIDTH, HEIGHT, LEFT, title, subtitle)
    whole = WIDTH - LEFT - RIGHT - GAP
    middle = LEFT + PIPELINE_SHARE * whole
    names = list(dict.fromkeys([*pipeline, *constant]))
    left = _Panel(LEFT, middle, pipeline, undelayed[0])
    left.draw(root, names, "delays of the pipeline; images per update")
    places = {delay for points in constant.values() for delay in points}
    right = _Panel(
        middle + GAP, WIDTH - RIGHT, constant, dict.fromkeys(sorted(places), undelayed[1])
    )
    right.draw(root, names, "delay of all weights, in updates")
    height = (TOP + HEIGHT - BOTTOM) / 2
    turned = text(root, 16, height, "accuracy on unseen images", size=13, anchor="middle")
    turned.set("transform", f"rotate(-90 16 {height:.1f})")
    for index, name in enumerate(["no delay (dashed)", *names]):
        y = TOP + 14 + index * LEGEND_LINE
        ink = COLOURS[(index - 1) % len(COLOURS)] if index else INK
        text(root, WIDTH - RIGHT + 16, y, name, size=12, weight="bold", fill=ink)
    return finished(root)


class _Panel:
    """Axes and lines; places at equal distances, since they double or quadruple."""

    def __init__(
        self, left: float, right: float, lines: Lines, undelayed: Mapping[int, float]
    ) -> None:
        self.left, self.right = left, right
        self.lines, self.undelayed = lines, undelayed
        self.places = sorted({place for points in lines.values() for place in points})
        lowest = min(spread.low for points in lines.values() for spread in points.values())
        self.tick = next((t for t in TICKS if (1 - lowest) / t <= 8), TICKS[-1])
        self.low = max(0.0, math.floor(lowest / self.tick) * self.tick)

    def draw(self, root: Xml.Element, names: list[str], words: str) -> None:
        bottom = HEIGHT - BOTTOM
        for number in range(round((1 - self.low) / self.tick) + 1):
            value = self.low + number * self.tick
            line(root, (self.left, self.y(value)), (self.right, self.y(value)), FAINT)
            digits = 3 if self.tick < 0.01 else 2
            place = (self.left - 8, self.y(value) + 4)
            text(root, *place, f"{value:.{digits}f}", size=12, anchor="end")
        line(root, (self.left, bottom), (self.right, bottom), INK)
        for place in self.places:
            text(root, self.x(place), bottom + 20, f"{place}", size=12, anchor="middle")
        middle = (self.left + self.right) / 2
        text(root, middle, bottom + 44, words, size=13, anchor="middle")
        self.polyline(root, self.undelayed, INK, {"stroke-dasharray": "5 4"})
        for name, points in self.lines.items():
            index = names.index(name)
            ink = COLOURS[index % len(COLOURS)]
            self.polyline(root, {p: s.mean for p, s in points.items()}, ink, {"stroke-width": "2"})
            for place, spread in points.items():
                # Side by side, so that ranges can be told apart.
                x = self.x(place) + 3 * (index - (len(names) - 1) / 2)
                line(root, (x, self.y(spread.low)), (x, self.y(spread.high)), ink)
                circle = {"cx": f"{x:.1f}", "cy": f"{self.y(spread.mean):.1f}", "r": "2.5"}
                Xml.SubElement(root, "circle", {**circle, "fill": ink})

    def polyline(
        self, root: Xml.Element, values: Mapping[int, float], ink: str, style: Mapping[str, str]
    ) -> None:
        points = " ".join(f"{self.x(p):.1f},{self.y(v):.1f}" for p, v in sorted(values.items()))
        Xml.SubElement(root, "polyline", {"points": points, "fill": "none", "stroke": ink, **style})

    def x(self, place: int) -> float:
        step = (self.right - self.left) / len(self.places)
        return self.left + (self.places.index(place) + 0.5) * step

    def y(self, accuracy: float) -> float:
        share = (1 - accuracy) / (1 - self.low)
        return TOP + share * (HEIGHT - TOP - BOTTOM)
