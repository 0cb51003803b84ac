"""Steps and seconds to a target for SGD, AdamW, Muon and K-FAC, all tuned by the same budget.

Two tasks: `examples/kfac_digits` and `examples/kfac_language_model`. Each method has five learning
rates to choose from and all else at its usual value; two tuning seeds decide by the median of the
steps to the target, and five other seeds are reported. Methods take turns between evaluations, with
one thread for all. Evaluations are not timed; capturing the model is, apart from the steps.

Run ``python -m benchmarks.kfac_convergence`` on an otherwise idle machine (under ten minutes). It
writes ``benchmarks/results/kfac_convergence.json`` and the pictures; ``--pictures`` draws them from
that file again, and ``--quick`` only shows in half a minute that all of it runs.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import RESULTS, keep
from benchmarks.kfac_convergence_picture import Curve, curves
from examples.kfac_digits import train as digits
from examples.kfac_digits.comparison import (
    ADAMW,
    KFAC,
    MUON,
    SGD_MOMENTUM,
    Run,
    Task,
    train,
)
from examples.kfac_language_model import train as characters

IMAGES = Path(__file__).parents[1] / "docs" / "images"
NAME = "kfac_convergence"
THREADS = 1
# Two decades in half decades, as many for each method.
RATES: dict[str, tuple[float, ...]] = {
    SGD_MOMENTUM: (0.01, 0.03, 0.1, 0.3, 1.0),
    ADAMW: (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    MUON: (1e-3, 3e-3, 1e-2, 3e-2, 0.1),
}
KFAC_RATES = {
    "digits": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
    "characters": (1e-5, 3e-5, 1e-4, 3e-4, 1e-3),  # see the damping of that example
}
TUNING_SEEDS = (100, 101)
SEEDS = (0, 1, 2, 3, 4)


def rates(task: str) -> dict[str, tuple[float, ...]]:
    """The learning rates that each method may choose from."""
    return {**RATES, KFAC: KFAC_RATES[task]}


# -- training --------------------------------------------------------------------------------------


def tune(
    task: Task, method: str, rates: Sequence[float], seeds: Sequence[int]
) -> tuple[float, dict[str, Any]]:
    """The learning rate with the fewest steps to the target, and what each of them needed.

    A run ends when it reaches the target or is lost. Where none reaches it, or two are equally
    fast, the last value decides.
    """
    tried: dict[str, Any] = {}
    keys: dict[float, tuple[float, float]] = {}
    for rate in rates:
        runs = [_until_target(train(task, method, rate, seed)) for seed in seeds]
        steps = statistics.median(_or_never(run.steps_to_target) for run in runs)
        value = statistics.median(run.points[-1][2] for run in runs)
        tried[f"{rate:g}"] = {"steps": _or_null(steps), "value": _or_null(value)}
        worse = -value if task.rising else value
        keys[rate] = (steps, worse if math.isfinite(worse) else math.inf)
    return min(rates, key=lambda rate: keys[rate]), tried


def _until_target(training: Iterator[Run]) -> Run:
    for run in training:
        if run.steps_to_target is not None or not math.isfinite(run.points[-1][2]):
            break
    return run


def together(task: Task, rates: Mapping[str, float], seed: int) -> dict[str, Run]:
    """Whole trainings by all methods, which take turns from one evaluation to the next."""
    running = {method: train(task, method, rate, seed) for method, rate in rates.items()}
    runs: dict[str, Run] = {}
    while running:
        for method, training in list(running.items()):
            found = next(training, None)
            if found is None:
                del running[method]
            else:
                runs[method] = found
    return runs


# -- results ---------------------------------------------------------------------------------------


def summary(task: Task, rate: float, candidates: Sequence[float], runs: Mapping[int, Run]) -> Any:
    """What is kept of one method's runs, by seed; JSON data.

    A run that never reached the target counts as infinitely long: the median and the upper end are
    ``null`` where they are such a run's.
    """
    steps = {seed: _or_never(run.steps_to_target) for seed, run in runs.items()}
    last = [run.points[-1] for run in runs.values()]
    # The middle one by steps; by the last value among those that are equally fast.
    worse = {seed: -r.points[-1][2] if task.rising else r.points[-1][2] for seed, r in runs.items()}
    order = sorted(runs, key=lambda seed: (steps[seed], worse[seed]))
    middle = order[(len(order) - 1) // 2]
    return {
        "rate": rate,
        "rate is at the edge of the grid": rate in (min(candidates), max(candidates)),
        "reached": sum(math.isfinite(s) for s in steps.values()),
        "runs": len(runs),
        "steps": _spread(list(steps.values())),
        "seconds": _spread([_or_never(run.seconds_to_target) for run in runs.values()]),
        "last value": _spread([value for _, _, value in last]),
        "milliseconds a step": _spread([1e3 * seconds / count for count, seconds, _ in last]),
        "setup seconds": _spread([run.setup for run in runs.values()]),
        "curve": [[step, round(value, 4)] for step, _, value in runs[middle].points],
    }


def _or_never(number: float | None) -> float:
    return math.inf if number is None else float(number)


def _or_null(number: float) -> float | None:
    return round(number, 4) if math.isfinite(number) else None


def _spread(values: Sequence[float]) -> dict[str, float | None]:
    found = {"median": statistics.median(values), "low": min(values), "high": max(values)}
    return {name: _or_null(value) for name, value in found.items()}


def measure(
    task: Task,
    rates: Mapping[str, Sequence[float]],
    tuning_seeds: Sequence[int],
    seeds: Sequence[int],
) -> dict[str, Any]:
    """Tune, train and sum up one task."""
    chosen, tuning = {}, {}
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", RuntimeWarning
        )  # a learning rate that is too large is to be expected
        for method in rates:
            chosen[method], tuning[method] = tune(task, method, rates[method], tuning_seeds)
            print(f"{task.name}: {method} at {chosen[method]:g}", file=sys.stderr, flush=True)
    runs = {seed: together(task, chosen, seed) for seed in seeds}
    return {
        "target": task.target,
        "rising": task.rising,
        "steps": task.steps,
        "tuning": tuning,
        "methods": {
            method: summary(
                task, chosen[method], rates[method], {seed: runs[seed][method] for seed in seeds}
            )
            for method in rates
        },
    }


def table(results: Mapping[str, Any]) -> str:
    """The results for a terminal."""
    lines = []
    for name, task in results.items():
        sign = "at least" if task["rising"] else "at most"
        lines += [f"{name}: {sign} {task['target']:g} within {task['steps']} steps"]
        lines += ["  method           rate  reached      steps to target        seconds to target"]
        for method, found in task["methods"].items():
            lines.append(
                f"  {method:<14}{found['rate']:>7g}{'*' if _edge(found) else ' '} "
                f"{found['reached']:>3} of {found['runs']}  {_words(found['steps'], '.0f'):>19}  "
                f"{_words(found['seconds'], '.2f'):>23}   last {found['last value']['median']}, "
                f"{found['milliseconds a step']['median']:.1f} ms a step, "
                f"{found['setup seconds']['median']:.2f} s to set up"
            )
    return "\n".join([*lines, "  * at the edge of its grid"])


def _edge(found: Mapping[str, Any]) -> bool:
    return bool(found["rate is at the edge of the grid"])


def _words(spread: Mapping[str, float | None], form: str) -> str:
    median, low, high = (
        "never" if spread[name] is None else format(spread[name], form)
        for name in ("median", "low", "high")
    )
    return f"{median} ({low} to {high})"


def draw(results: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write a picture per task from the results alone."""
    axes = {"digits": "validation accuracy", "characters": "validation loss, nats per character"}
    written = []
    for name, task in results.items():
        lines = {
            method: Curve(
                [(step, value) for step, value in found["curve"] if math.isfinite(value)],
                _words(found["steps"], ".0f"),
            )
            for method, found in task["methods"].items()
        }
        subtitle = (
            "The middle one of five trainings per method, at its tuned learning rate; beside the "
            f"name, steps to {task['target']:g}: median (lowest to highest)."
        )
        path = folder / f"kfac_{name}.svg"
        folder.mkdir(exist_ok=True)
        path.write_text(
            curves(f"Steps to a target: {name}", subtitle, axes[name], lines, task["target"])
        )
        written.append(path)
    return written


def main(arguments: Sequence[str] | None = None) -> None:
    about = (__doc__ or "").split("\n", 1)[0]
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--quick", action="store_true", help="show that it runs; keep nothing")
    parser.add_argument("--pictures", action="store_true", help="draw what was kept")
    chosen = parser.parse_args(arguments)
    if chosen.pictures:
        kept = json.loads((RESULTS / f"{NAME}.json").read_text())
        print(table(kept["results"]))
        draw(kept["results"], IMAGES)
        return
    torch.set_num_threads(THREADS)
    tasks = [digits.task(), characters.task()]
    if chosen.quick:
        short = {"digits": 44, "characters": 20}
        found = {}
        for task in tasks:
            few = {method: grid[1:4:2] for method, grid in rates(task.name).items()}
            task = replace(task, steps=short[task.name])
            found[task.name] = measure(task, few, TUNING_SEEDS[:1], SEEDS[:2])
        print(table(found))
        return
    results = {t.name: measure(t, rates(t.name), TUNING_SEEDS, SEEDS) for t in tasks}
    print(table(results))
    print("kept in", keep(NAME, results).name)
    draw(results, IMAGES)


if __name__ == "__main__":
    main()
