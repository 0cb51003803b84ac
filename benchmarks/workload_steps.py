"""Training steps of the scientific workloads: graphopt against PyTorch eager and `torch.compile`.

One step is forward and backward at the size that the workload trains with. Alternating runs in one
process; medians of paired ratios with bootstrap intervals; first calls in seconds. Run
``python -m benchmarks.workload_steps [NAME ...]`` on an otherwise idle machine. The results go to
``benchmarks/results/workload_steps_<device>.json``, those of a CPU into ``docs/workloads.md``;
workloads that were not named keep theirs.
"""

from __future__ import annotations

import copy
import importlib
import json
import os
import statistics
import sys
import tempfile
import time
from typing import Any

import torch
from torch import nn

import graphopt
from benchmarks.harness import RESULTS, alternate, keep, milliseconds, ratio
from benchmarks.workloads import WORKLOADS
from benchmarks.workloads_table import DOCUMENT, with_steps
from graphopt.examples.common import Case
from graphopt.model.surface import report

SECONDS = 12.0  # of alternating runs of one workload


def measure(case: Case) -> dict[str, Any]:
    """Steps of one workload in six ways."""
    variants = {
        "pytorch": lambda: copy.deepcopy(case.model),
        "compile": lambda: torch.compile(copy.deepcopy(case.model)),
        **{
            f"graphopt {backend}": (
                lambda backend=backend: graphopt.optimize(
                    copy.deepcopy(case.model), passes=case.passes, backend=backend
                )
            )
            for backend in ("eager", "inductor", "auto")
        },
    }
    models: dict[str, nn.Module] = {}
    first: dict[str, float] = {}
    for name, make in variants.items():
        torch._dynamo.reset()
        with tempfile.TemporaryDirectory() as cache:  # nobody finds what another has compiled
            os.environ["XDG_CACHE_HOME"] = os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
            start = time.perf_counter()
            models[name] = make()
            _step(case, models[name])
            first[name] = round(time.perf_counter() - start, 2)
    steps = {name: (lambda m=model: _step(case, m)) for name, model in models.items()}
    longest = max(statistics.median(_times(step)) for step in steps.values())
    rounds = max(7, min(101, int(SECONDS / (longest * len(steps)))))
    times = alternate(steps, rounds, warmup=1)
    better = min(("pytorch", "compile"), key=lambda peer: statistics.median(times[peer]))
    text = json.loads(report(models["graphopt eager"]).to_json())
    return {
        "milliseconds": milliseconds(times),
        "first call, s": first,
        "captured as": f"{len(text['specialisations'])} graph, {len(text['plain'])} plain",
        "rounds": rounds,
        "better peer": better,
        "auto over the better": ratio(times, "graphopt auto", better),
        "eager over pytorch": ratio(times, "graphopt eager", "pytorch"),
        "inductor over compile": ratio(times, "graphopt inductor", "compile"),
    }


def _step(case: Case, model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = None
    case.loss(model(*case.inputs)).backward()


def _times(step: Any) -> list[float]:
    found = []
    for _ in range(3):
        start = time.perf_counter()
        step()
        found.append(time.perf_counter() - start)
    return found


def main(names: list[str]) -> None:
    """Measure, print and keep."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    path = RESULTS / f"workload_steps_{device.type}.json"
    results = json.loads(path.read_text())["results"] if path.exists() else {}
    for name in names or WORKLOADS:
        torch.manual_seed(0)
        workload = importlib.import_module(f"graphopt.examples.{name}.train").WORKLOAD
        results[name] = measure(workload.case(device))
        print(name, json.dumps(results[name], indent=1), flush=True)
        results = {n: results[n] for n in WORKLOADS if n in results}
        keep(f"workload_steps_{device.type}", results)
    if device.type == "cpu":
        DOCUMENT.write_text(with_steps(DOCUMENT.read_text(), results))


if __name__ == "__main__":
    main(sys.argv[1:])
