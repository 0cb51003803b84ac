"""Steps, or first calls, of two checkouts of graphopt, side by side.

Run ``python -m benchmarks.two_checkouts steps|eager|first OLD [NEW]`` on an otherwise idle machine,
where OLD and NEW are checkouts (NEW is this one by default). Each checkout gets a process of its
own, which imports its graphopt and its benchmarks; blocks of steps alternate between the two, so
that both see the same machine. ``eager`` is ``steps`` without generated code. ``first`` times the
first call of each model of the corpus: capture, passes, verification and the call itself, on a new
model each time. Results go to ``benchmarks/results/two_checkouts_<what>_<device>.json``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROUNDS = {"steps": 31, "eager": 11, "first": 9}
# Steps of one block: long enough that a switch between processes does not count.
BLOCK_SECONDS = 0.25


def _steps(*backends: str) -> dict[str, Callable[[], object]]:
    """The steps that are timed; only what both checkouts have may be used here."""
    import torch
    import torch.nn.functional as F

    from benchmarks.kfac_step_variants import mlp, optimized, resnet
    from benchmarks.models import digits_resnet, tiny_gpt2
    from benchmarks.step_time import training_step
    from graphopt import optimize

    torch.set_num_threads(1)
    torch.manual_seed(0)
    images, labels = torch.randn(64, 1, 8, 8), torch.randint(10, (64,))
    tokens = torch.randint(512, (8, 64))

    def on_tokens(out: Any) -> torch.Tensor:
        return F.cross_entropy(out.logits.flatten(0, 1), tokens.flatten())

    found = {}
    for backend in backends:
        model = optimize(digits_resnet(), backend=backend)
        found[f"digits ResNet, {backend}"] = training_step(
            model, (images,), lambda out: F.cross_entropy(out, labels)
        )
        model = optimize(tiny_gpt2(), backend=backend)
        found[f"tiny GPT-2, {backend}"] = training_step(model, (tokens,), on_tokens)
    for name, task in {"ResNet-8": resnet(64), "MLP": mlp(128)}.items():
        for interval in (1, 10):
            spec = f"kfac{{damping=0.01,interval={interval}}}"
            found[f"K-FAC {name}, interval {interval}"] = optimized(task, spec)[0]
    return found


def _first_calls() -> dict[str, Callable[[], object]]:
    """A new model of the corpus, called for the first time; returns the seconds of that call."""
    import torch

    from graphopt import optimize
    from graphopt.testing.corpus import CORPUS, CorpusModel

    torch.set_num_threads(1)

    def first_call(entry: CorpusModel) -> Callable[[], float]:
        def run() -> float:
            torch._dynamo.reset()
            model, args, kwargs = entry.make()
            start = time.perf_counter()
            optimize(model, backend="eager")(*args, **kwargs)
            return time.perf_counter() - start

        return run

    return {name: first_call(entry) for name, entry in CORPUS.items()}


def _serve(what: str) -> None:
    """Time a block of steps for each line that names one."""
    backends = {"steps": ("eager", "inductor"), "eager": ("eager",)}
    steps = _steps(*backends[what]) if what in backends else _first_calls()
    counts = {}
    for name, step in steps.items():
        if what == "first":  # the very first one imports and fills caches
            step()
            counts[name] = 1
            continue
        for _ in range(12):
            step()
        start = time.perf_counter()
        for _ in range(10):
            step()
        counts[name] = max(10, round(10 * BLOCK_SECONDS / (time.perf_counter() - start) / 10) * 10)
    print(json.dumps(counts), flush=True)
    for line in sys.stdin:
        name, count = json.loads(line)
        start = time.perf_counter()
        told = [steps[name]() for _ in range(count)]
        seconds = (time.perf_counter() - start) / count
        print(told[0] if what == "first" else seconds, flush=True)


class _Checkout:
    def __init__(self, folder: Path, what: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, "serve", what],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(folder)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def read(self) -> Any:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def time(self, name: str, count: int) -> float:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([name, count]) + "\n")
        self.process.stdin.flush()
        return float(self.read())

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def main(what: str, old: Path, new: Path) -> None:
    from benchmarks.harness import keep, milliseconds, ratio

    before, after = _Checkout(old, what), _Checkout(new, what)
    counts = before.read()
    assert after.read().keys() == counts.keys()
    results = {}
    for name, count in counts.items():
        times: dict[str, list[float]] = {"before": [], "after": []}
        for index in range(ROUNDS[what]):
            pair = [("before", before), ("after", after)]
            for which, checkout in pair[:: 1 if index % 2 else -1]:
                times[which].append(checkout.time(name, count))
        results[name] = {
            "milliseconds": milliseconds(times),
            "after over before": ratio(times, "after", "before"),
        }
        print(name, results[name], flush=True)
    before.end()
    after.end()
    print("kept in", keep(f"two_checkouts_{what}_cpu", results).name)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        _serve(sys.argv[2])
    else:
        what, old, *new = sys.argv[1:]
        main(what, Path(old), Path(new[0]) if new else Path(__file__).parents[1])
