"""The four panels of the workload."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from graphopt.examples.common import COLOURS, GREY, panels

_SHOWN = 12  # metastable states


def draw(path: Path, found: Mapping[str, Any]) -> None:
    """Write the figure.

    Args:
        path: of the file.
        found: ``data``, P(K) of test words; ``models``, P(K) by name; ``calibration``, log-odds
            and fractions of spikes; ``heat``, of 14 neurons; ``modes``, states and their basins.
    """
    with panels(path, 2, 2, height=3.4) as axes:
        _synchrony(axes[0, 0], found["data"], found["models"])
        _neurons(axes[0, 1], *found["calibration"])
        _heat(axes[1, 0], found["heat"])
        _modes(axes[1, 1], *found["modes"])


def _synchrony(axis: Any, data: Any, models: Mapping[str, Any]) -> None:
    for colour, (name, p) in zip(
        (COLOURS[3], COLOURS[1], COLOURS[0], GREY), models.items(), strict=True
    ):
        style = ":" if colour == GREY else "-"
        axis.semilogy(p, style, color=colour, label=name)
    axis.semilogy(data, "o", color=COLOURS[2], markersize=4, label="test words")
    axis.set_ylim(3e-5, 1)
    axis.set_xlabel("spikes in a bin, K")
    axis.set_ylabel("probability P(K)")
    axis.legend(fontsize=8)


def _neurons(axis: Any, odds: Any, spikes: Any) -> None:
    line = torch.linspace(float(odds.min()) - 0.3, float(odds.max()) + 0.3, 100)
    axis.plot(line, torch.sigmoid(line), color=GREY, label="logistic function")
    axis.plot(odds, spikes, "o", color=COLOURS[0], label="test words, K-pairwise model")
    axis.set_xlabel("log-odds of a spike, given all other neurons")
    axis.set_ylabel("fraction of bins with a spike")
    axis.legend(fontsize=8)


def _heat(axis: Any, heat: Mapping[str, Any]) -> None:
    axis.plot(heat["temperatures"], heat["exact"], color=GREY, label="enumeration")
    axis.plot(
        heat["temperatures"], heat["sampled"], "o", color=COLOURS[0], markersize=4, label="chains"
    )
    axis.set_xlabel("temperature T")
    axis.set_ylabel("heat capacity of 14 neurons, nats")
    axis.legend(fontsize=8)


def _modes(axis: Any, states: Any, basins: Any) -> None:
    shown = min(_SHOWN, states.shape[1])
    for column in range(shown):
        neurons = states[:, column].nonzero()[:, 0]
        axis.plot([column] * len(neurons), neurons, "s", color=COLOURS[0], markersize=3)
    labels = [f"{100 * float(b):.2g}" for b in basins[:shown]]
    axis.set_xticks(range(shown), labels, rotation=60, fontsize=7)
    axis.set_xlabel("metastable states, by their share of test words in %")
    axis.set_ylabel("neurons that spike")
    axis.set_ylim(-1, len(states))
