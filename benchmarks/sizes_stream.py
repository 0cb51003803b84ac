"""A stream of 200 batches of other lengths: graphopt against ``torch.compile(dynamic=None)``.

Each variant runs in a process of its own with empty caches; a variant and its peer run side by
side, on one core each. Seconds of all steps, compilation included, and of a step of the last
hundred in which nothing is compiled. Run ``python -m benchmarks.sizes_stream [NAME[:KIND] ...]``,
where a kind is ``eager`` or ``inductor``, on an otherwise idle machine; pairs that were not named
keep what they had in ``benchmarks/results/sizes_stream.json``.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from typing import Any

import torch
from torch import nn

import graphopt
from benchmarks.harness import RESULTS, keep
from benchmarks.sizes import data, sizes_of
from benchmarks.sizes_models import CASES
from graphopt.model.controller import controller_of

STEPS, STEADY = 200, 100
PAIRS = {"eager": ("graphopt eager", "compile aot_eager"),
         "inductor": ("graphopt inductor", "compile inductor")}  # fmt: skip


def worker(name: str, variant: str) -> dict[str, Any]:
    """One variant in this process."""
    case = CASES[name]
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = case.make()
    kind, _, backend = variant.partition(" ")
    batches = [data(case, *sizes) for sizes in sizes_of(case, STEPS)]
    call: Any = model
    if kind == "graphopt":
        call = graphopt.optimize(model, backend=backend)
    elif kind == "compile":
        call = torch.compile(model, dynamic=None, backend=backend)
    times = []
    for batch in batches:
        start = time.perf_counter()
        for parameter in model.parameters():
            parameter.grad = None
        case.loss(call(**batch)).backward()
        times.append(time.perf_counter() - start)
    used = [resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return {
        "total, s": round(sum(times), 2),
        "CPU, s": round(sum(u.ru_utime + u.ru_stime for u in used), 2),
        "steady, ms": round(1e3 * statistics.median(times[-STEADY:]), 3),
        "compiled": _compiled(model),
        "longest, s": [round(t, 1) for t in sorted(times)[-4:]],
    }


def _compiled(model: nn.Module) -> int:
    controller = controller_of(model)
    if controller is not None:
        return controller.made
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def pair(name: str, variants: tuple[str, ...]) -> dict[str, Any]:
    """A variant and its peer at the same time."""
    cores = sorted(os.sched_getaffinity(0))
    running = []
    with tempfile.TemporaryDirectory() as folder:
        for number, variant in enumerate(variants):
            cache = os.path.join(folder, str(number))
            surroundings = {
                "TORCHINDUCTOR_CACHE_DIR": cache,
                "XDG_CACHE_HOME": cache,
                "TORCHINDUCTOR_COMPILE_THREADS": "1",
                "OMP_NUM_THREADS": "1",
            }
            core = {cores[number % len(cores)]}
            running.append(
                subprocess.Popen(
                    [sys.executable, "-m", "benchmarks.sizes_stream", "worker", name, variant],
                    stdout=subprocess.PIPE,
                    text=True,
                    env=os.environ | surroundings,
                    preexec_fn=lambda core=core: os.sched_setaffinity(0, core),
                )
            )
        found = {}
        for variant, process in zip(variants, running, strict=True):
            out = process.communicate()[0].strip().splitlines()
            found[variant] = json.loads(out[-1]) if process.returncode == 0 else "failed"
    ours, theirs = (found[v] for v in variants)
    if isinstance(ours, dict) and isinstance(theirs, dict):
        keys = {"total over its": "total, s", "steady over its": "steady, ms",
                "CPU over its": "CPU, s"}  # fmt: skip
        found |= {name: round(ours[key] / theirs[key], 3) for name, key in keys.items()}
    return found


def main(names: list[str]) -> None:
    """Measure, print and keep."""
    if names[:1] == ["worker"]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            print(json.dumps(worker(*names[1:])))
        return
    path = RESULTS / "sizes_stream.json"
    results = json.loads(path.read_text())["results"] if path.exists() else {}
    for name in names or [f"{model}:{kind}" for model in ("gpt2", "graphs") for kind in PAIRS]:
        model, _, kind = name.partition(":")
        results[name] = pair(model, PAIRS[kind])
        print(name, json.dumps(results[name], indent=1), flush=True)
        keep("sizes_stream", results)


if __name__ == "__main__":
    main(sys.argv[1:])
