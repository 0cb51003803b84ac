"""A simulated pipeline as a chart: one row per rank, a box per action, as a self-contained SVG."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING
from xml.etree import ElementTree as Xml

from graphopt.render.svg import FAINT, INK, finished, line, page, text
from graphopt.render.units import duration

if TYPE_CHECKING:
    from graphopt.simulate.pipeline import PipelineTrace

WIDTH = 1000
LEFT, RIGHT, TOP, BOTTOM = 88, 24, 104, 40
ROW, BOX = 34, 24
LABEL = 14  # a box is labelled if it is at least so wide

FILLS = {
    "F": ("#1f6feb", "forward"),
    "B": ("#2d7d46", "backward"),
    "I": ("#d1570a", "gradient of the input"),
    "W": ("#7a4fbf", "gradients of parameters"),
    "UPDATE": ("#24292f", "update"),
    "SEND_F": ("#8c959f", "transfer"),
    "RECV_F": ("#8c959f", "transfer"),
    "SEND_B": ("#8c959f", "transfer"),
    "RECV_B": ("#8c959f", "transfer"),
}
_NAME = re.compile(r"(\d+)([A-Z_]+)(\d+)")


def pipeline_chart(trace: PipelineTrace, title: str, subtitle: str = "") -> str:
    """The chart of one simulated run; boxes carry the number of their micro-batch.

    Args:
        trace: what was simulated.
        title: the first line.
        subtitle: smaller, below it; by default the length of the step and its bubble.
    """
    subtitle = subtitle or (
        f"{duration(trace.step)}, ranks idle {100 * trace.bubble:.1f} % of the time"
    )
    height = TOP + ROW * len(trace.lanes) + BOTTOM
    root = page(WIDTH, height, LEFT, title, subtitle)
    scale = (WIDTH - LEFT - RIGHT) / trace.step if trace.step > 0 else 0.0
    for row, lane in enumerate(trace.lanes):
        y = TOP + ROW * row
        text(root, LEFT - 10, y + BOX / 2 + 4, lane, size=12, anchor="end")
        line(root, (LEFT, y + BOX), (WIDTH - RIGHT, y + BOX), FAINT)
        for span in trace.spans:
            if span.lane == lane:
                box = (LEFT + scale * span.start, y, scale * span.seconds)
                _draw(root, box, span.name, f"{span.name}: {duration(span.seconds)}", lane)
    bottom = TOP + ROW * len(trace.lanes)
    line(root, (LEFT, bottom), (WIDTH - RIGHT, bottom), INK)
    text(root, LEFT, bottom + 18, "0", size=12, anchor="middle")
    text(root, WIDTH - RIGHT, bottom + 18, duration(trace.step), size=12, anchor="end")
    _legend(root, trace)
    return finished(root)


def _draw(
    root: Xml.Element, box: tuple[float, float, float], name: str, tip: str, lane: str
) -> None:
    x, y, width = box
    found = _NAME.fullmatch(name)
    kind, batch = (found[2], found[3]) if found else ("UPDATE", "")
    fill = FILLS["SEND_F" if lane.startswith("link ") else kind][0]
    place = {"x": f"{x:.2f}", "y": f"{y:.1f}", "width": f"{max(width, 0.5):.2f}"}
    style = {"height": str(BOX), "fill": fill, "stroke": "#ffffff", "stroke-width": "0.5"}
    rectangle = Xml.SubElement(root, "rect", {**place, **style})
    Xml.SubElement(rectangle, "title").text = tip
    if width >= LABEL:
        middle = x + width / 2
        text(root, middle, y + BOX / 2 + 4, batch, size=11, anchor="middle", fill="#ffffff")


def _legend(root: Xml.Element, trace: PipelineTrace) -> None:
    kinds = {found[2] for span in trace.spans if (found := _NAME.fullmatch(span.name))}
    shown = {what: fill for kind, (fill, what) in FILLS.items() if kind in kinds}
    if any(lane.startswith("link ") for lane in trace.lanes):
        shown["transfer"] = FILLS["SEND_F"][0]
    x = float(LEFT)
    for what, fill in shown.items():
        square = {"x": f"{x:.1f}", "y": "72", "width": "12", "height": "12", "fill": fill}
        Xml.SubElement(root, "rect", square)
        text(root, x + 18, 82, what, size=12)
        x += 36 + 7 * len(what)
