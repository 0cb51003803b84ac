"""Figures that can be read on light and on dark pages."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from graphopt.extras import extra

# In the middle between white and black, so that a contrast remains with either.
GREY = "#808080"
COLOURS = ("#1f8fd0", "#e07b1a", "#1aa67a", "#cf5fa8", "#d0503c", "#8f7fe0", "#9a8a2a")


def drawable() -> None:
    """Say before long work if the figure at its end could not be drawn.

    Raises:
        ExtraError: matplotlib is not installed.
    """
    with extra("examples", "a figure"):
        import matplotlib  # noqa: F401


@contextlib.contextmanager
def panels(
    path: Path, rows: int = 1, columns: int = 1, *, width: float = 9.0, height: float = 3.2
) -> Iterator[Any]:
    """Axes to draw on; leaving writes ``path`` (SVG, or PNG by its suffix).

    Args:
        path: the file.
        rows: of panels.
        columns: of panels.
        width: of the whole figure, inches.
        height: of one row, inches.

    Yields:
        An array of matplotlib axes of shape (rows, columns).
    """
    with extra("examples", "a figure"):
        import matplotlib

    matplotlib.use("Agg")
    from cycler import cycler
    from matplotlib import pyplot as plt

    style: Any = {
        "axes.edgecolor": GREY,
        "axes.labelcolor": GREY,
        "axes.titlecolor": GREY,
        "axes.titlesize": 10,
        "axes.facecolor": "none",
        "axes.prop_cycle": cycler(color=COLOURS),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "figure.facecolor": "none",
        "font.size": 10,
        "grid.color": GREY,
        "grid.alpha": 0.25,
        "legend.frameon": False,
        "legend.labelcolor": GREY,
        "savefig.facecolor": "none",
        "svg.fonttype": "none",
        "svg.hashsalt": "graphopt",
        "text.color": GREY,
        "xtick.color": GREY,
        "ytick.color": GREY,
    }
    with plt.rc_context(style):
        drawn, axes = plt.subplots(
            rows, columns, figsize=(width, height * rows), squeeze=False, layout="constrained"
        )
        try:
            yield axes
            is_svg = path.suffix == ".svg"
            drawn.savefig(path, dpi=110, metadata={"Date": None} if is_svg else None)
        finally:
            plt.close(drawn)
