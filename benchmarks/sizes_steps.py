"""Steps of a graph with symbolic sizes against those of a graph for one size, in eager's backend.

Both are of one model, at one size, in one process, alternating in random order. CPU seconds on one
thread, so that what else runs on the machine counts little. Run
``python -m benchmarks.sizes_steps [NAME ...]``; models that were not named keep what they had in
``benchmarks/results/sizes_steps.json``.
"""

from __future__ import annotations

import copy
import json
import random
import sys
import time
import warnings
from typing import Any

import torch
from torch import nn

import graphopt
from benchmarks.harness import RESULTS, keep, milliseconds, ratio
from benchmarks.sizes import data
from benchmarks.sizes_models import CASES, Case

ROUNDS = 60
SIZES, OTHERS = (8, 64), (11, 71)


def varying(case: Case) -> dict[str, dict[int, str]]:
    """Which sizes of arguments differ between two batches, each under a name of its own."""
    one, other = data(case, *SIZES), data(case, *OTHERS)
    found: dict[str, dict[int, str]] = {}
    for name, value in one.items():
        for number, size in enumerate(getattr(value, "shape", ())):
            if size != other[name].shape[number]:
                found.setdefault(name, {})[number] = f"{name}.{number}"
    return found


def measure(case: Case) -> dict[str, Any]:
    """Median CPU seconds of a step, and the paired ratio."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    plain = case.make()
    batch = data(case, *SIZES)
    ways: dict[str, Any] = {"static": False, "symbolic": varying(case)}
    models: dict[str, nn.Module] = {"eager": plain} | {
        name: graphopt.optimize(copy.deepcopy(plain), backend="eager", dynamic=way, verify="off")
        for name, way in ways.items()
    }
    for model in models.values():
        for _ in range(3):
            _step(case, model, batch)
    order, times = random.Random(0), {name: [] for name in models}  # type: ignore[var-annotated]
    for _ in range(ROUNDS):
        for name in order.sample(list(models), len(models)):
            start = time.process_time()
            _step(case, models[name], batch)
            times[name].append(time.process_time() - start)
    return {
        "CPU milliseconds": milliseconds(times),
        "symbolic over static": ratio(times, "symbolic", "static"),
        "symbolic over eager": ratio(times, "symbolic", "eager"),
        "rounds": ROUNDS,
    }


def _step(case: Case, model: nn.Module, batch: Any) -> None:
    for parameter in model.parameters():
        parameter.grad = None
    case.loss(model(**batch)).backward()


def main(names: list[str]) -> None:
    """Measure, print and keep."""
    path = RESULTS / "sizes_steps.json"
    results = json.loads(path.read_text())["results"] if path.exists() else {}
    for name in names or CASES:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            results[name] = measure(CASES[name])
        print(name, json.dumps(results[name]), flush=True)
        keep("sizes_steps", {n: results[n] for n in CASES if n in results})


if __name__ == "__main__":
    main(sys.argv[1:])
