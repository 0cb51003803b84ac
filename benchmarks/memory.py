"""Bytes that a training step holds: saved for the backward, and at most at once.

PyTorch eager, graphopt's eager backend and its Inductor, and `torch.compile` with ``aot_eager`` and
with Inductor where they compile the model, on the models of `benchmarks.zoo`. Bytes are those of
torch's allocator, as its profiler records them: nothing is put between the step and its operators.
Parameters and the batch are there before and do not count; gradients do. Of the first call of an
optimized model, which captures and verifies, the most at once is told as well.

Counts do not depend on load. Run ``python -m benchmarks.memory [NAME ...] [--variants ...]``; what
was not named keeps what it had in ``benchmarks/results/memory_cpu.json``.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

import graphopt
from benchmarks.harness import RESULTS, keep
from benchmarks.tables import FIRST
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


def peer(made: Step, backend: str) -> dict[str, int]:
    """Bytes of `torch.compile`."""
    torch._dynamo.reset()
    compiled: Any = torch.compile(copy.deepcopy(made.model), backend=backend)
    return of_step(replace(made, model=compiled))


def graphopt_of(made: Step) -> dict[str, int]:
    """Bytes of the eager backend, and the most that its first call has at once."""
    ours = replace(made, model=graphopt.optimize(copy.deepcopy(made.model), backend="eager"))
    gc.collect()
    gc.disable()  # what an earlier model has left must not be freed in between
    try:
        first = tally(ours).peak
    finally:
        gc.enable()
    return {**of_step(ours), "peak of the first call": first}


VARIANTS: dict[str, Callable[[Step], dict[str, int]]] = {
    "eager": of_step,
    "graphopt": graphopt_of,
    "aot_eager": lambda made: peer(made, "aot_eager"),
    "inductor": lambda made: peer(made, "inductor"),
    "graphopt, Inductor": lambda made: of_step(
        replace(made, model=graphopt.optimize(copy.deepcopy(made.model), backend="inductor"))
    ),
}


def measure(name: str, variants: Iterable[str] = VARIANTS) -> dict[str, dict[str, int]]:
    """Bytes of a model by variant, without those that cannot run it."""
    found = {}
    for variant in variants:
        try:
            found[variant] = VARIANTS[variant](step(name))
        except Exception as error:
            if variant in ("eager", "graphopt"):
                raise
            print(f"{name}: {variant} fails with {type(error).__name__}", flush=True)
    return found


def compared(found: Mapping[str, Mapping[str, int]]) -> dict[str, object]:
    """What is kept of a model."""
    eager, ours = found["eager"], found["graphopt"]
    return {
        "bytes": found,
        "saved over eager": round(ours["saved"] / eager["saved"], 4),
        "peak over eager": round(ours["peak"] / eager["peak"], 4),
        FIRST: round(ours["peak of the first call"] / eager["peak"], 4),
    }


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*")
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=list(VARIANTS))
    asked = parser.parse_args()
    path = RESULTS / f"{NAME}.json"
    results = json.loads(path.read_text())["results"] if path.exists() else {}
    torch.set_num_threads(1)
    everything = (*ZOO, *SMALL)
    for name in asked.names or [n for n in everything if n not in results]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            before = results.get(name, {}).get("bytes", {})
            found = {**before, **measure(name, asked.variants)}
        results[name] = compared({v: found[v] for v in VARIANTS if v in found})
        print(name, json.dumps(results[name]), flush=True)
        keep(NAME, {n: results[n] for n in everything if n in results})


if __name__ == "__main__":
    main()
