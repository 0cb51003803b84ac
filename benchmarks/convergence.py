"""Steps and seconds to a target for seven optimizers, all tuned by the same budget.

Two tasks: `examples/kfac_digits` and `examples/kfac_language_model`. Every method has 15 trials:
nine learning rates over four decades, the same for all, then the best one and its neighbours with
two other values of one more setting. All else is at its usual value. Two tuning seeds decide by the
steps to the target, and five other seeds are reported.

Steps are counted first, which other load does not disturb. Seconds come from trainings of their
own, in which the methods take turns between evaluations, with one thread for all, each as far as it
needs to the target: seconds to the target are steps times seconds per step. Evaluations are not
timed; capturing the model is, apart from the steps.

Run ``python -m benchmarks.convergence``; ``--count`` only counts steps, ``--time`` only adds
seconds, for which the machine has to be idle. It writes ``benchmarks/results/convergence.json`` and
the pictures; ``--pictures`` draws them from that file again.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.convergence_picture import draw
from benchmarks.harness import RESULTS, keep
from examples.kfac_digits import train as digits
from examples.kfac_digits.comparison import (
    ADAMW,
    KFAC,
    LARC_SGD,
    LARS_SGD,
    METHODS,
    MUON,
    SGD_MOMENTUM,
    TORCH_MUON,
    USUAL,
    Run,
    Task,
    train,
)
from examples.kfac_language_model import train as characters

IMAGES = Path(__file__).parents[1] / "docs" / "images"
NAME = "convergence"
THREADS = 1
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


# -- steps -----------------------------------------------------------------------------------------


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
            total += _or_never(run.steps_to_target)
            found.append(run)
            if total > len(seeds) * best:
                break
        steps = total / len(seeds)
        value = statistics.median(run.points[-1][2] for run in found)
        tried.append({**trial._asdict(), "steps": _or_null(steps), "value": _or_null(value)})
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


def count(
    task: Task,
    method: str,
    rates: Sequence[float],
    tuning_seeds: Sequence[int],
    seeds: Sequence[int],
    settings: Sequence[float] = (),
) -> dict[str, Any]:
    """Tune one method, and train with what was chosen; JSON data."""
    with warnings.catch_warnings():
        # A learning rate that is too large is to be expected.
        warnings.simplefilter("ignore", RuntimeWarning)
        chosen, tried = tune(task, method, rates, tuning_seeds, settings)
        runs = {}
        for seed in seeds:
            *_, runs[seed] = train(task, method, chosen.rate, seed, setting=chosen.setting)
    found = summary(task, chosen, rates, runs)
    print(f"{task.name}: {method} at {chosen.rate:g}, {chosen.setting:g}: {found['steps']}")
    sys.stdout.flush()
    return {**found, "setting is": USUAL[method][0], "tuning": tried}


def summary(
    task: Task, chosen: Trial, rates: Sequence[float], runs: Mapping[int, Run]
) -> dict[str, Any]:
    """What is kept of one method's runs, by seed; JSON data.

    A run that never reached the target counts as infinitely long: the median and the upper end are
    ``null`` where they are such a run's.
    """
    steps = {seed: _or_never(run.steps_to_target) for seed, run in runs.items()}
    # The middle one by steps; by the last value among those that are equally fast.
    worse = {seed: -r.points[-1][2] if task.rising else r.points[-1][2] for seed, r in runs.items()}
    order = sorted(runs, key=lambda seed: (steps[seed], worse[seed]))
    middle = order[(len(order) - 1) // 2]
    return {
        "rate": chosen.rate,
        "rate is at the edge of the grid": chosen.rate in (min(rates), max(rates)),
        "setting": chosen.setting,
        "reached": sum(math.isfinite(s) for s in steps.values()),
        "runs": len(runs),
        "steps": _spread(list(steps.values())),
        "steps by seed": [_or_null(s) for s in steps.values()],
        "last value": _spread([run.points[-1][2] for run in runs.values()]),
        "curve": [[step, round(value, 4)] for step, _, value in runs[middle].points],
    }


# -- seconds ---------------------------------------------------------------------------------------


def timed(task: Task, methods: Mapping[str, Any], seeds: Sequence[int]) -> dict[str, Any]:
    """Seconds for what was counted: each method as far as its median steps to the target.

    A method whose median run never reaches it runs as far as the slowest that does, or for the
    whole length if none does. Methods take turns from one evaluation to the next, seed by seed.
    """
    reached = [found["steps"]["median"] for found in methods.values() if found["steps"]["median"]]
    slowest = max(reached, default=task.steps)
    paces: dict[str, list[float]] = {method: [] for method in methods}
    setups: dict[str, list[float]] = {method: [] for method in methods}
    for seed in seeds:
        running = {}
        for method, found in methods.items():
            length = math.ceil(found["steps"]["median"] or slowest)
            running[method] = train(
                task, method, found["rate"], seed, length, setting=found["setting"]
            )
        runs: dict[str, Run] = {}
        while running:
            for method, training in list(running.items()):
                run = next(training, None)
                if run is None:
                    del running[method]
                else:
                    runs[method] = run
        for method, run in runs.items():
            steps, seconds, _ = run.points[-1]
            paces[method].append(seconds / steps)
            setups[method].append(run.setup)
    return {
        method: {
            **found,
            "milliseconds a step": _spread([1e3 * pace for pace in paces[method]]),
            "seconds": _spread(
                [
                    _or_never(steps) * statistics.median(paces[method])
                    for steps in found["steps by seed"]
                ]
            ),
            "setup seconds": _spread(setups[method]),
        }
        for method, found in methods.items()
    }


# -- results ---------------------------------------------------------------------------------------


def _or_never(number: float | None) -> float:
    return math.inf if number is None else float(number)


def _or_null(number: float) -> float | None:
    return round(number, 4) if math.isfinite(number) else None


def _spread(values: Sequence[float]) -> dict[str, float | None]:
    found = {"median": statistics.median(values), "low": min(values), "high": max(values)}
    return {name: _or_null(value) for name, value in found.items()}


def about(task: Task) -> dict[str, Any]:
    """What the results say of the task itself."""
    return {"target": task.target, "rising": task.rising, "steps": task.steps}


def measure(
    task: Task,
    rates: Mapping[str, Sequence[float]],
    tuning_seeds: Sequence[int],
    seeds: Sequence[int],
) -> dict[str, Any]:
    """Count and time one task, all methods with their usual settings."""
    counted = {m: count(task, m, rates[m], tuning_seeds, seeds) for m in rates}
    return {**about(task), "methods": timed(task, counted, seeds)}


def table(results: Mapping[str, Any]) -> str:
    """The results for a terminal."""
    lines = []
    for name, task in results.items():
        sign = "at least" if task["rising"] else "at most"
        lines += [f"{name}: {sign} {task['target']:g} within {task['steps']} steps"]
        lines += ["  method           rate  setting  reached      steps to target  seconds to it"]
        for method, found in task["methods"].items():
            star = "*" if found["rate is at the edge of the grid"] else " "
            line = (
                f"  {method:<14}{found['rate']:>7g}{star} {found['setting']:>7g} "
                f"{found['reached']:>3} of {found['runs']}  {_words(found['steps'], '.0f'):>19}"
            )
            if "seconds" in found:
                line += (
                    f"  {_words(found['seconds'], '.2f')}, "
                    f"{found['milliseconds a step']['median']:.1f} ms a step, "
                    f"{found['setup seconds']['median']:.2f} s to set up"
                )
            lines.append(f"{line}, last {found['last value']['median']}")
    return "\n".join([*lines, "  * at the edge of its grid"])


def _words(spread: Mapping[str, float | None], form: str) -> str:
    median, low, high = (
        "never" if spread[name] is None else format(spread[name], form)
        for name in ("median", "low", "high")
    )
    return f"{median} ({low} to {high})"


def main(arguments: Sequence[str] | None = None) -> None:
    """Count, time, draw."""
    tasks = {task.name: task for task in (digits.task(), characters.task())}
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("tasks", nargs="*", metavar="TASK", help=f"of {', '.join(tasks)}; all")
    parser.add_argument("--method", choices=METHODS, action="append", help="count only these")
    parser.add_argument("--count", action="store_true", help="steps only")
    parser.add_argument("--time", action="store_true", help="seconds only")
    parser.add_argument("--pictures", action="store_true", help="draw what was kept")
    options = parser.parse_args(arguments)
    if unknown := set(options.tasks) - set(tasks):
        parser.error(f"unknown tasks: {', '.join(sorted(unknown))}")
    torch.set_num_threads(THREADS)
    both = not (options.count or options.time or options.pictures)
    for name in () if options.pictures else options.tasks or tasks:
        task = tasks[name]
        if options.count or both:
            for method in options.method or METHODS:
                found = count(task, method, RATES, TUNING_SEEDS, SEEDS, SETTINGS[method])
                _merge(name, about(task), {method: found})
        if options.time or both:
            _merge(name, about(task), timed(task, _kept()[name]["methods"], SEEDS))
    print(table(_kept()))
    draw(_kept(), IMAGES)


def _kept() -> dict[str, Any]:
    path = RESULTS / f"{NAME}.json"
    return dict(json.loads(path.read_text())["results"]) if path.exists() else {}


def _merge(name: str, told: Mapping[str, Any], methods: Mapping[str, Any]) -> None:
    """Put results of some methods beside those that are there, in the order of the methods."""
    kept = _kept()
    have = {**kept.get(name, {}).get("methods", {}), **methods}
    kept[name] = {**told, "methods": {m: have[m] for m in METHODS if m in have}}
    keep(NAME, kept)


if __name__ == "__main__":
    main()
