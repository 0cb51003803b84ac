"""What the default verification costs at the first call, in eager steps of the same model.

Run ``python -m benchmarks.verification`` on an otherwise idle machine; the results go to
``benchmarks/results/verification_<device>.json``. An eager step is forward and backward, median of
ten after two. The comparison with eager runs the model's own step once and what graphopt will run
once; bit-equal graphs run once more each on large values.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import torch

import graphopt
from benchmarks.harness import keep
from graphopt.model.surface import report
from graphopt.testing.corpus import CORPUS

BACKENDS = ("eager", "inductor")
MODELS = ("resnet", "densenet", "vit", "gpt2", "bert", "lstm_ctc", "unet")


def _eager_seconds(name: str) -> float:
    model, args, kwargs = CORPUS[name].make()
    times = []
    for _ in range(12):
        start = time.perf_counter()
        CORPUS[name].loss(model(*args, **kwargs)).backward()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def measure(name: str, backends: Sequence[str] = BACKENDS) -> dict[str, float]:
    """Of one model of the corpus."""
    step = _eager_seconds(name)
    row = {"eager step, ms": round(1e3 * step, 3)}
    for backend in backends:
        found = []
        for _ in range(3):
            model, args, kwargs = CORPUS[name].make()
            graphopt.optimize(model, backend=backend, cache="off")
            CORPUS[name].loss(model(*args, **kwargs)).backward()
            found.append(report(model).specialisations[0])
        seconds = statistics.median(entry.verification.seconds for entry in found)
        row[f"{backend}, ms"] = round(1e3 * seconds, 1)
        row[f"{backend}, eager steps"] = round(seconds / step, 1)
        row[f"{backend}, share of the capture"] = round(
            seconds / statistics.median(entry.capture_seconds for entry in found), 3
        )
    return row


def main() -> None:
    """Measure all models, print and keep."""
    torch.set_num_threads(1)
    results = {}
    for name in MODELS:
        results[name] = measure(name)
        print(name, results[name], flush=True)
    print("kept in", keep("verification_cpu", results).name)


if __name__ == "__main__":
    main()
