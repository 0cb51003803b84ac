"""Training steps of graphopt's eager backend over PyTorch eager's, on models nothing was tuned for.

Forward and backward from empty gradients, one thread, both in one process, alternating in random
order; CPU seconds, so that what else runs on the machine counts little. The models are those of
`benchmarks.zoo`. Run ``python -m benchmarks.zoo_steps [NAME ...]``; models that were not named keep
what they had in ``benchmarks/results/zoo_steps_cpu.json``. Without names those are measured that
have nothing there, as many as ``--minutes`` allow.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import statistics
import time
import warnings
from dataclasses import replace
from typing import Any

import torch

import graphopt
from benchmarks.harness import RESULTS, keep, milliseconds, ratio
from benchmarks.zoo import SMALL, ZOO, step

NAME = "zoo_steps_cpu"
SECONDS = 4.0  # of steps, per model
ROUNDS = 30, 200  # at least and at most


def measure(name: str) -> dict[str, Any]:
    """Median CPU seconds of a step, and the paired ratio."""
    plain = step(name)
    model = graphopt.optimize(copy.deepcopy(plain.model), backend="eager", verify="off")
    steps = {"eager": plain, "graphopt": replace(plain, model=model)}
    for run in steps.values():
        for _ in range(3):
            run()
    start = time.process_time()
    for run in steps.values():
        run()
    rounds = round(SECONDS / max(1e-4, time.process_time() - start))
    rounds = max(ROUNDS[0], min(ROUNDS[1], rounds))
    order, times = random.Random(0), {n: [] for n in steps}  # type: ignore[var-annotated]
    for _ in range(rounds):
        for key in order.sample(list(steps), len(steps)):
            start = time.process_time()
            steps[key]()
            times[key].append(time.process_time() - start)
    return {
        "CPU milliseconds": milliseconds(times),
        "graphopt over eager": ratio(times, "graphopt", "eager"),
        "rounds": rounds,
    }


def summary(results: dict[str, Any], names: Any) -> dict[str, Any]:
    """Median and worst of the ratios of these models."""
    found = {n: results[n]["graphopt over eager"]["median"] for n in names if n in results}
    if not found:
        return {}
    worst = max(found, key=lambda n: found[n])
    return {
        "models": len(found),
        "median": round(statistics.median(found.values()), 4),
        "worst": found[worst],
        "worst model": worst,
    }


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*")
    parser.add_argument("--minutes", type=float, default=60.0)
    asked = parser.parse_args()
    path = RESULTS / f"{NAME}.json"
    results = json.loads(path.read_text())["results"]["models"] if path.exists() else {}
    torch.set_num_threads(1)
    everything = (*ZOO, *SMALL)
    end = time.monotonic() + 60 * asked.minutes
    for name in asked.names or [n for n in everything if n not in results]:
        if time.monotonic() > end:
            break
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                results[name] = measure(name)
        except Exception as error:
            print(f"{name} was not measured: {type(error).__name__}: {error}", flush=True)
            continue
        print(name, json.dumps(results[name]), flush=True)
        kept = {n: results[n] for n in everything if n in results}
        sums = {"steps of 10 ms and more": summary(kept, ZOO), "corpus": summary(kept, SMALL)}
        keep(NAME, {"models": kept, **sums})


if __name__ == "__main__":
    main()
