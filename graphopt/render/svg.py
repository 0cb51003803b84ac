"""Self-contained SVG pictures: a white page with a title, lines and words."""

from __future__ import annotations

import textwrap
from xml.etree import ElementTree as Xml

COLOURS = ("#1f6feb", "#d1570a", "#2d7d46", "#7a4fbf", "#b3256b", "#8a6d00", "#0b7285")
INK, FAINT = "#24292f", "#d8dee4"
SUBTITLE_LINE = 16
CHARACTER = 6.6  # width of a wide character of the subtitle, at 12 pixels


def page(width: int, height: int, left: float, title: str, subtitle: str) -> Xml.Element:
    """An empty picture.

    Args:
        width: of the picture, in pixels, like all lengths here.
        height: of the picture.
        left: where title and subtitle start.
        title: the first line.
        subtitle: smaller, below it; more than one line where it is long.
    """
    size = {"width": str(width), "height": str(height), "viewBox": f"0 0 {width} {height}"}
    root = Xml.Element(
        "svg",
        {"xmlns": "http://www.w3.org/2000/svg", **size, "font-family": "sans-serif", "fill": INK},
    )
    Xml.SubElement(root, "title").text = title
    Xml.SubElement(root, "rect", {"width": "100%", "height": "100%", "fill": "#ffffff"})
    text(root, left, 28, title, size=17, weight="bold")
    fits = int((width - left) / CHARACTER)
    for number, words in enumerate(textwrap.wrap(subtitle, fits)):
        text(root, left, 50 + SUBTITLE_LINE * number, words, size=12)
    return root


def finished(root: Xml.Element) -> str:
    """The text of the file."""
    Xml.indent(root)
    return Xml.tostring(root, encoding="unicode") + "\n"


def colour(index: int) -> str:
    """The colour of series `index`; colours repeat."""
    return COLOURS[index % len(COLOURS)]


def line(
    root: Xml.Element, start: tuple[float, float], end: tuple[float, float], stroke: str
) -> None:
    """A straight line."""
    (x1, y1), (x2, y2) = start, end
    places = {"x1": f"{x1:.1f}", "y1": f"{y1:.1f}", "x2": f"{x2:.1f}", "y2": f"{y2:.1f}"}
    Xml.SubElement(root, "line", {**places, "stroke": stroke})


def text(
    root: Xml.Element,
    x: float,
    y: float,
    words: str,
    *,
    size: int,
    anchor: str = "start",
    weight: str = "normal",
    fill: str = INK,
) -> Xml.Element:
    """Words whose base line is at `y`; `anchor` says which end of them is at `x`."""
    place = {"x": f"{x:.1f}", "y": f"{y:.1f}", "font-size": str(size), "fill": fill}
    element = Xml.SubElement(root, "text", {**place, "text-anchor": anchor, "font-weight": weight})
    element.text = words
    return element
