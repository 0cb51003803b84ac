"""The figure: error over the number of images, and over the size of the Jacobian."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from graphopt.examples.common import COLOURS, GREY, panels

_METHODS = ("none", "weight decay", "Jacobian", "model-aware", "ridge")
_LABELS = {
    "none": "no penalty",
    "Jacobian": "‖J‖²",
    "model-aware": "‖JA‖² (model-aware)",
    "ridge": "ridge regression",
}


def draw(path: Path, tables: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Draw what the run has found."""
    colours = dict(
        zip(_METHODS, (COLOURS[4], COLOURS[1], COLOURS[0], COLOURS[2], GREY), strict=True)
    )
    with panels(path, 1, 2, height=3.6) as axes:
        left, right = axes[0]
        rows = tables["squared error on test images"]
        for method in _METHODS:
            left.plot(
                [row["n"] for row in rows],
                [row[method] for row in rows],
                marker="o",
                linestyle="--" if method == "ridge" else "-",
                color=colours[method],
                label=_LABELS.get(method, method),
            )
        left.set_xscale("log")
        left.set_xticks([row["n"] for row in rows], [str(row["n"]) for row in rows])
        left.minorticks_off()
        left.set(xlabel="training images", ylabel="squared error per test image")
        left.grid(visible=True)
        left.legend(loc="lower left")
        for method in _METHODS[:-1]:
            of_method = [row for row in tables["trainings"] if row["method"] == method]
            right.scatter(
                [row["norm"] for row in of_method],
                [row["test"] - row["training"] for row in of_method],
                color=colours[method],
                s=22,
            )
        right.set(
            xlabel="‖JA‖ on test images (Frobenius, root mean square)",
            ylabel="test error minus training error",
        )
        right.grid(visible=True)
