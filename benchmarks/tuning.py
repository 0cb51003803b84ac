"""One budget for all optimizers: 15 trials each, and how their results are written down.

Nine learning rates over four decades, the same for all, then the best one and its neighbours with
two other values of one more setting. Two tuning seeds decide by the steps to the target.
"""

from __future__ import annotations

import json
import math
import statistics
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from benchmarks.harness import RESULTS
from examples.kfac_digits.comparison import (
    ADAMW,
    KFAC,
    LARC_SGD,
    LARS_SGD,
    MUON,
    SGD_MOMENTUM,
    TORCH_MUON,
    USUAL,
    Run,
    Task,
    train,
)

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0)
# What else is tried beside the usual value, see `USUAL`.
SETTINGS: dict[str, tuple[float, ...]] = {
    SGD_MOMENTUM: (0.8, 0.95),
    ADAMW: (0.99, 0.95),
    TORCH_MUON: (0.9, 0.98),
    MUON: (0.9, 0.98),
    LARC_SGD: (0.02, 0.2),
    LARS_SGD: (0.01, 0.1),
    KFAC: (0.1, 10.0),
}
TUNING_SEEDS = (100, 101)
SEEDS = (0, 1, 2, 3, 4)


class Trial(NamedTuple):
    """A learning rate and the other setting."""

    rate: float
    setting: float


def tune(
    task: Task,
    method: str,
    rates: Sequence[float],
    seeds: Sequence[int],
    settings: Sequence[float] = (),
) -> tuple[Trial, list[dict[str, Any]]]:
    """The trial with the fewest steps to the target, and what each of them needed.

    The mean over the seeds counts. A trial ends as soon as it cannot be the best. Where none
    reaches the target, or two are equally fast, the last value decides. Steps of trials that never
    reached it, or were given up, are ``None``.

    Args:
        task: what is trained.
        method: tuned.
        rates: all are tried with the usual setting, three of them with the others.
        seeds: of the trials.
        settings: other values than the usual one.
    """
    tried = []
    keys: dict[Trial, tuple[float, float]] = {}

    def attempt(trial: Trial) -> None:
        best = min((steps for steps, _ in keys.values()), default=math.inf)
        found, total = [], 0.0
        for seed in seeds:
            run = _until(task, method, trial, seed, len(seeds) * best - total)
            total += or_never(run.steps_to_target)
            found.append(run)
            if total > len(seeds) * best:
                break
        steps = total / len(seeds)
        value = statistics.median(run.points[-1][2] for run in found)
        tried.append({**trial._asdict(), "steps": or_null(steps), "value": or_null(value)})
        worse = -value if task.rising else value
        keys[trial] = (steps, worse if math.isfinite(worse) else math.inf)

    # Middle rates first: most others are then given up early.
    for rate in sorted(rates, key=lambda rate: abs(math.log10(rate) + 2)):
        attempt(Trial(rate, USUAL[method][1]))
    ordered = sorted(rates)
    place = ordered.index(min(keys, key=lambda trial: keys[trial]).rate)
    first = max(0, min(place - 1, len(ordered) - 3))
    for setting in settings:
        for rate in ordered[first : first + 3]:
            attempt(Trial(rate, setting))
    return min(keys, key=lambda trial: keys[trial]), tried


def _until(task: Task, method: str, trial: Trial, seed: int, limit: float) -> Run:
    """A training until it reaches the target, is lost, or has made more steps than the limit."""
    for run in train(task, method, trial.rate, seed, setting=trial.setting):
        step, _, value = run.points[-1]
        if run.steps_to_target is not None or not math.isfinite(value) or step > limit:
            break
    return run


@contextmanager
def losses_expected() -> Iterator[None]:
    """Without warnings that gradients are not finite: some learning rates are too large."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


# -- results ---------------------------------------------------------------------------------------


def about_trial(chosen: Trial, rates: Sequence[float]) -> dict[str, Any]:
    """What is kept of the trial that was chosen of these rates; JSON data."""
    return {
        "rate": chosen.rate,
        "rate is at the edge of the grid": chosen.rate in (min(rates), max(rates)),
        "setting": chosen.setting,
    }


def or_never(number: float | None) -> float:
    """Steps, where ``None`` is a run that never arrived."""
    return math.inf if number is None else float(number)


def or_null(number: float) -> float | None:
    """A number that JSON can hold."""
    return round(number, 4) if math.isfinite(number) else None


def spread(values: Sequence[float]) -> dict[str, float | None]:
    """Median, lowest and highest."""
    found = {"median": statistics.median(values), "low": min(values), "high": max(values)}
    return {name: or_null(value) for name, value in found.items()}


def in_words(found: Mapping[str, float | None], form: str) -> str:
    """A spread for a table."""
    median, low, high = (
        "never" if found[name] is None else format(found[name], form)
        for name in ("median", "low", "high")
    )
    return f"{median} ({low} to {high})"


def kept_of(name: str) -> dict[str, Any]:
    """The results of a benchmark that were kept before."""
    path = RESULTS / f"{name}.json"
    return dict(json.loads(path.read_text())["results"]) if path.exists() else {}
