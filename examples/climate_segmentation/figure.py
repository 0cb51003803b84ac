"""The figure: what is predicted for one field, and how the trainings compare."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from graphopt.examples.climate_segmentation.data import Fields
from graphopt.examples.climate_segmentation.metrics import CYCLONE, Scores
from graphopt.examples.common import COLOURS, GREY, panels


class Shown(Protocol):
    """A training's results, see `graphopt.examples.climate_segmentation.train.Outcome`."""

    early: Scores
    final: Scores
    losses: list[float]
    predicted: Tensor


def draw(path: Path, test: Fields, shown: Mapping[str, Shown]) -> None:
    """Write the figure.

    Args:
        path: an SVG.
        test: fields that were predicted.
        shown: results by name; the first three differ in their weights, the fourth lags.
    """
    names = list(shown)
    storms = [int((labels == 1).any() and (labels == 2).sum()) for labels in test.labels.cpu()]
    chosen = int(np.argmax(storms))
    with panels(path, 2, 3, height=2.7) as axes:
        for axis, name in zip(axes[0], names[:3], strict=True):
            _map(axis, test, chosen, shown[name].predicted)
            axis.set_title(name if "weights" in name else f"weights {name}")
        axes[0, 0].set_ylabel("latitude (grid points)")
        _bars(axes[1, 0], names[:3], [shown[n].early.recall[CYCLONE] for n in names[:3]])
        axes[1, 0].set_title("cyclone recall after 1/4 of training")
        _bars(axes[1, 1], names[:3], [shown[n].final.iou[CYCLONE] for n in names[:3]])
        axes[1, 1].set_title("cyclone IoU at the end")
        for name, label in ((names[1], "synchronous"), (names[3], "gradients 1 step late")):
            axes[1, 2].semilogy(_mean(shown[name].losses), label=label)
        axes[1, 2].set_title(f"weights {names[1]}")
        axes[1, 2].set_xlabel("step")
        axes[1, 2].set_ylabel("loss (mean of 8 steps)")
        axes[1, 2].legend()


def _map(axis: Any, test: Fields, chosen: int, predicted: Tensor) -> None:
    truth = test.labels[chosen].cpu().numpy()
    axis.imshow(test.values[chosen, 0].cpu().numpy(), origin="lower", cmap="Greys", vmax=4)
    for index, colour in ((1, COLOURS[0]), (2, COLOURS[4])):
        found = (predicted[chosen] == index).cpu().numpy()
        if found.any():
            axis.contourf(found, [0.5, 1.5], colors=[colour], alpha=0.7)
        if (truth == index).any():
            axis.contour(truth == index, [0.5], colors=["black"], linewidths=0.8)
    axis.set_xlabel("longitude (grid points)")


def _bars(axis: Any, names: list[str], heights: list[float]) -> None:
    bars = axis.bar(names, heights, color=COLOURS[0])
    axis.bar_label(bars, fmt="%.2f", color=GREY)
    axis.set_ylim(0, 1.1)
    axis.set_xlabel("class weights")


def _mean(losses: list[float], window: int = 8) -> list[float]:
    kernel = np.full(min(window, len(losses)), 1 / min(window, len(losses)))
    smooth: list[float] = np.convolve(losses, kernel, "valid").tolist()
    return smooth
