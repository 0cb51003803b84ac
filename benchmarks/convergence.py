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
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.convergence_picture import draw
from benchmarks.harness import keep
from benchmarks.tuning import (
    RATES,
    SEEDS,
    SETTINGS,
    TUNING_SEEDS,
    Trial,
    about_trial,
    in_words,
    kept_of,
    losses_expected,
    or_never,
    or_null,
    spread,
    tune,
)
from examples.kfac_digits import train as digits
from examples.kfac_digits.comparison import METHODS, USUAL, Run, Task, train
from examples.kfac_language_model import train as characters

IMAGES = Path(__file__).parents[1] / "docs" / "images"
NAME = "convergence"
THREADS = 1

# -- steps -----------------------------------------------------------------------------------------


def count(
    task: Task,
    method: str,
    rates: Sequence[float],
    tuning_seeds: Sequence[int],
    seeds: Sequence[int],
    settings: Sequence[float] = (),
) -> dict[str, Any]:
    """Tune one method, and train with what was chosen; JSON data."""
    runs = {}
    with losses_expected():
        chosen, tried = tune(task, method, rates, tuning_seeds, settings)
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
    steps = {seed: or_never(run.steps_to_target) for seed, run in runs.items()}
    # The middle one by steps; by the last value among those that are equally fast.
    worse = {seed: -r.points[-1][2] if task.rising else r.points[-1][2] for seed, r in runs.items()}
    order = sorted(runs, key=lambda seed: (steps[seed], worse[seed]))
    middle = order[(len(order) - 1) // 2]
    return {
        **about_trial(chosen, rates),
        "reached": sum(math.isfinite(s) for s in steps.values()),
        "runs": len(runs),
        "steps": spread(list(steps.values())),
        "steps by seed": [or_null(s) for s in steps.values()],
        "last value": spread([run.points[-1][2] for run in runs.values()]),
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
            "milliseconds a step": spread([1e3 * pace for pace in paces[method]]),
            "seconds": spread(
                [
                    or_never(steps) * statistics.median(paces[method])
                    for steps in found["steps by seed"]
                ]
            ),
            "setup seconds": spread(setups[method]),
        }
        for method, found in methods.items()
    }


# -- results ---------------------------------------------------------------------------------------


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
                f"{found['reached']:>3} of {found['runs']}  {in_words(found['steps'], '.0f'):>19}"
            )
            if "seconds" in found:
                line += (
                    f"  {in_words(found['seconds'], '.2f')}, "
                    f"{found['milliseconds a step']['median']:.1f} ms a step, "
                    f"{found['setup seconds']['median']:.2f} s to set up"
                )
            lines.append(f"{line}, last {found['last value']['median']}")
    return "\n".join([*lines, "  * at the edge of its grid"])


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
            _merge(name, about(task), timed(task, kept_of(NAME)[name]["methods"], SEEDS))
    print(table(kept_of(NAME)))
    draw(kept_of(NAME), IMAGES)


def _merge(name: str, told: Mapping[str, Any], methods: Mapping[str, Any]) -> None:
    """Put results of some methods beside those that are there, in the order of the methods."""
    kept = kept_of(NAME)
    have = {**kept.get(name, {}).get("methods", {}), **methods}
    kept[name] = {**told, "methods": {m: have[m] for m in METHODS if m in have}}
    keep(NAME, kept)


if __name__ == "__main__":
    main()
