"""Bytes that a training step holds: saved for the backward, and at most at once.

PyTorch eager, graphopt's eager backend, and `torch.compile` with ``aot_eager`` where it compiles
the model, on the models of `benchmarks.zoo`. Bytes are those of torch's allocator, as its profiler
records them: nothing is put between the step and its operators. Parameters and the batch are there
before and do not count; gradients do. Of the first call of an optimized model, which captures and
verifies, the most at once is told as well.

Counts do not depend on load. Run ``python -m benchmarks.memory [NAME ...]``; models that were not
named keep what they had in ``benchmarks/results/memory_cpu.json``.
"""

from __future__ import annotations

import copy
import gc
import json
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

import graphopt
from benchmarks.harness import RESULTS, keep
from benchmarks.zoo import SMALL, ZOO, Step, step

NAME = "memory_cpu"


@dataclass(frozen=True)
class Held:
    """Bytes of a run.

    Attributes:
        peak: the most that there were at once, beyond those of the beginning.
        left: what there is at the end, beyond those of the beginning.
    """

    peak: int
    left: int


def tally(run: Callable[[], object]) -> Held:
    """Bytes that a run allocates on the CPU, by the records of torch's profiler.

    What the run returns is still there at the end.
    """
    gc.collect()  # what is freed later would count
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        result = run()
    recorder: Any = profiler.profiler
    recorded = recorder.kineto_results.events()
    changes = sorted(
        (e.start_ns(), i, e.nbytes()) for i, e in enumerate(recorded) if e.name() == "[memory]"
    )
    del result
    peak = now = 0
    for *_, change in changes:
        now += change
        peak = max(peak, now)
    return Held(peak, now)


def of_step(made: Step) -> dict[str, int]:
    """Bytes saved by the forward, with its outputs, and the most of forward and backward."""
    for _ in range(2):
        made()
    made.forget()
    torch.manual_seed(1)
    saved = tally(lambda: made.loss(made.model(*made.args, **made.kwargs)))
    made.forget()
    torch.manual_seed(1)
    return {"saved": saved.left, "peak": tally(made).peak}


def measure(name: str) -> dict[str, object]:
    """All variants of one model."""
    plain = step(name)
    first = replace(plain, model=graphopt.optimize(copy.deepcopy(plain.model), backend="eager"))
    ours_first = tally(first).peak
    eager = of_step(plain)
    variants = {"eager": eager, "graphopt": of_step(first)}
    try:
        torch._dynamo.reset()
        compiled: Any = torch.compile(copy.deepcopy(plain.model), backend="aot_eager")
        variants["aot_eager"] = of_step(replace(plain, model=compiled))
    except Exception as error:
        print(f"{name}: torch.compile fails with {type(error).__name__}", flush=True)
    return {
        "bytes": variants,
        "saved over eager": round(variants["graphopt"]["saved"] / eager["saved"], 4),
        "peak over eager": round(variants["graphopt"]["peak"] / eager["peak"], 4),
        "peak of the first call over eager's step": round(ours_first / eager["peak"], 4),
    }


def main(names: list[str]) -> None:
    """Measure, print and keep."""
    path = RESULTS / f"{NAME}.json"
    results = json.loads(path.read_text())["results"] if path.exists() else {}
    torch.set_num_threads(1)
    for name in names or [n for n in (*ZOO, *SMALL) if n not in results]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            results[name] = measure(name)
        print(name, json.dumps(results[name]), flush=True)
        keep(NAME, {n: results[n] for n in (*ZOO, *SMALL) if n in results})


if __name__ == "__main__":
    main(sys.argv[1:])
