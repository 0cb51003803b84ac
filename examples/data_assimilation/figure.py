"""The figure: one trajectory, and errors over time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from graphopt.examples.common import COLOURS, GREY, panels
from graphopt.examples.data_assimilation.data import PENDULUM, Trajectories

SECONDS = PENDULUM.interval


def draw(path: Path, test: Trajectories, estimates: dict[str, Tensor], seen: int) -> None:
    """Draw estimates of the pendulum.

    Args:
        path: of the figure.
        test: what was estimated, (B, T, 2).
        estimates: by method, (B, T or fewer, 2).
        seen: time steps with observations; what follows is forecast.
    """
    swing = test.states[:, :, 0].abs().amax(1)
    chosen = int(swing.sub(swing.quantile(0.8)).abs().argmin())  # a wide swing: sines are ambiguous
    colours = dict(zip(estimates, COLOURS, strict=False))
    with panels(path, 2, 1, height=3.0) as axes:
        _trajectory(axes[0, 0], test, estimates, chosen, colours, seen)
        _errors(axes[1, 0], test, estimates, colours, seen)


def _trajectory(
    axes: Any,
    test: Trajectories,
    estimates: dict[str, Tensor],
    chosen: int,
    colours: dict[str, str],
    seen: int,
) -> None:
    times = [SECONDS * t for t in range(test.states.shape[1])]
    axes.plot(times, test.states[chosen, :, 0], color=GREY, linewidth=4, alpha=0.6, label="truth")
    observed = test.observations[chosen, :seen, 0]
    axes.plot(
        times[:seen], observed, ".", color=GREY, markersize=4, label="observed: sin θ + noise"
    )
    for method in list(estimates)[:2]:
        axes.plot(times, estimates[method][chosen, :, 0], color=colours[method], label=method)
    _forecast_begins(axes, seen)
    axes.set_xlabel("time / s")
    axes.set_ylabel("angle θ / rad")
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 1.2), ncols=4)


def _errors(
    axes: Any,
    test: Trajectories,
    estimates: dict[str, Tensor],
    colours: dict[str, str],
    seen: int,
) -> None:
    for method, found in estimates.items():
        error = (found - test.states[:, : found.shape[1]]).square().mean((0, 2)).sqrt()
        times = [SECONDS * t for t in range(len(error))]
        axes.plot(times, error, color=colours[method], label=method)
    _forecast_begins(axes, seen)
    axes.set_yscale("log")
    axes.set_xlabel("time / s")
    axes.set_ylabel("RMSE of (θ / rad, ω / 4 rad s⁻¹)")
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 1.2), ncols=5)


def _forecast_begins(axes: Any, seen: int) -> None:
    begin = SECONDS * (seen - 0.5)
    axes.axvline(begin, color=GREY, linestyle=":")
    axes.text(begin, 1.0, " forecast", transform=axes.get_xaxis_transform(), va="top", fontsize=8)
