"""The figure: forecasts at one station, and the interval scores of all models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graphopt.examples.common import COLOURS, GREY, panels
from graphopt.examples.spatiotemporal.data import Samples
from graphopt.examples.spatiotemporal.scores import Prediction


def draw(
    path: Path,
    training: Samples,
    test: Samples,
    prediction: Prediction,
    rows: Sequence[Mapping[str, Any]],
) -> None:
    """Draw a station that is forecast, one that is filled in, and the scores."""
    with panels(path, 1, 3, width=10.5, height=3.4) as axes:
        forecast, filled, scores = axes[0]
        places = torch.unique(test.inputs[:, 1:], dim=0)
        counts = torch.tensor([int(_at(test, place).sum()) for place in places])
        for axis, index, title in (
            (forecast, int(counts.argmin()), "last weeks of a station"),
            (filled, int(counts.argmax()), "a station without data"),
        ):
            _station(axis, places[index], training, test, prediction)
            axis.set(title=title, xlabel="week", ylabel="value")
        filled.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=2, fontsize=9)
        names = [str(row["model"]).partition(" (")[0] for row in rows]
        bars = scores.barh(
            names, [row["mis"] for row in rows], color=[COLOURS[2], COLOURS[0]] + [GREY] * 5
        )
        scores.bar_label(bars, fmt="%.2f", padding=2, color=GREY)
        scores.margins(x=0.2)
        scores.invert_yaxis()
        scores.set(title="smaller is better", xlabel="mean interval score (95 %)")


def _at(samples: Samples, place: Tensor) -> Tensor:
    return (samples.inputs[:, 1:] == place).all(dim=1)


def _station(
    axis: Any, place: Tensor, training: Samples, test: Samples, prediction: Prediction
) -> None:
    seen, here = _at(training, place), _at(test, place)
    axis.plot(training.inputs[seen, 0], training.values[seen], ".", color=GREY, markersize=3)
    week = test.inputs[here, 0]
    axis.fill_between(
        week,
        prediction.lower[here],
        prediction.upper[here],
        color=COLOURS[2],
        alpha=0.3,
        label="95 % interval",
        linewidth=0,
    )
    axis.plot(week, prediction.mean[here], color=COLOURS[2], label="mean")
    axis.plot(week, test.values[here], ".", color=COLOURS[1], markersize=4, label="held out")
