"""The figure: a deblurred signal, errors, and what an inversion costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from graphopt.examples.common import COLOURS, GREY, panels
from graphopt.examples.common.results import Value
from graphopt.examples.inverse_tikhonov.baselines import Array

_COLOURS = {
    "nDNN": COLOURS[1],
    "mcDNN": COLOURS[3],
    "TNet": COLOURS[0],
    "Tikhonov": GREY,
    "Gauss-Newton": GREY,
}


@dataclass(frozen=True)
class Deblurred:
    """One test signal.

    Attributes:
        u: the truth, (cells,).
        y: what was observed, (cells,).
        curves: reconstructions by method, (cells,) each.
    """

    u: Array
    y: Array
    curves: Mapping[str, Array]


def draw(
    path: Path,
    signal: Deblurred,
    tables: Mapping[str, list[dict[str, Value]]],
    values: Mapping[str, Value],
) -> None:
    """Write the figure to ``path``."""
    with panels(path, 1, 3, width=11.0, height=3.4) as axes:
        first, second, third = axes[0]
        x = (np.arange(len(signal.u)) + 0.5) / len(signal.u)
        first.plot(x, signal.y, ".", color=COLOURS[2], markersize=4, label="observed")
        first.plot(x, signal.u, color=GREY, linewidth=3, alpha=0.5, label="truth")
        for name in ("nDNN", "TNet"):
            first.plot(x, signal.curves[name], color=_COLOURS[name], label=name)
        first.plot(x, signal.curves["Tikhonov"], "--", color=GREY, linewidth=1, label="Tikhonov")
        first.set(
            xlabel="position (interval lengths)", ylabel="u", title="deconvolution, a test signal"
        )
        first.legend(fontsize=8, ncols=2)
        names, ratios = [], []
        for table, short in (("deconvolution", "blur"), ("heat", "heat")):
            for row in tables[table][1:]:
                names.append(f"{row['method']}\n{short}")
                ratios.append(float(row["over Tikhonov"]))
        colours = [_COLOURS[name.split("\n")[0]] for name in names]
        second.bar(range(len(names)), ratios, color=colours, width=0.7)
        second.axhline(1, color=GREY, linewidth=1, linestyle="--")
        second.set_xticks(range(len(names)), names, fontsize=8)
        second.set(ylabel="relative error / Tikhonov's", title="test error, 20 and 50 samples")
        for place, ratio in enumerate(ratios):
            second.text(place, ratio, f"{ratio:.2f}", ha="center", va="bottom", fontsize=8)
        errors = {str(row["method"]): float(row["relative error"]) for row in tables["heat"]}
        for name in ("Gauss-Newton", "TNet"):
            cost = float(values[f"heat: ms per inversion, {name}"])
            third.plot(cost, errors[name], "o", color=_COLOURS[name], markersize=9)
            third.annotate(
                f"{name}\n{cost:.2g} ms",
                (cost, errors[name]),
                (0, 12),
                ha="center",
                textcoords="offset points",
                fontsize=9,
            )
        third.set_xscale("log")
        third.margins(0.4)
        third.set_ylim(0, 1.3 * max(errors["Gauss-Newton"], errors["TNet"]))
        third.set(xlabel="ms per inversion", ylabel="relative error", title="heat conduction")
