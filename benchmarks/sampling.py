"""What comparisons cost that are repeated while a model trains, in steps of the same model.

Run ``python -m benchmarks.sampling`` on an otherwise idle machine; the results go to
``benchmarks/results/sampling_cpu.json``. Steps are forward and backward. Steps between two samples
alternate with those of a model without sampling. A sample is timed as `explain()` shows it; on two
ranks, a sampled step, in which the reduction is compared as well, against the median of the others.
"""

from __future__ import annotations

import socket
import statistics
import time
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import graphopt
from benchmarks.harness import alternate, keep, milliseconds, ratio
from graphopt.model.surface import report
from graphopt.testing.corpus import CORPUS

MODELS = ("resnet", "vit", "gpt2")
ROUNDS = 61
EVERY = 8


def _step(name: str, verify: str) -> tuple[Any, Any]:
    model, args, kwargs = CORPUS[name].make()
    graphopt.optimize(model, backend="eager", verify=verify)

    def step() -> None:
        for parameter in model.parameters():
            parameter.grad = None
        CORPUS[name].loss(model(*args, **kwargs)).backward()

    return model, step


def _alone(name: str) -> dict[str, object]:
    steps = {v: _step(name, v)[1] for v in ("eager", "sample{every=1000000}")}
    times = alternate(steps, ROUNDS)
    model, step = _step(name, f"sample{{every={EVERY}}}")
    for _ in range(5 * EVERY + 1):
        step()
    samples = report(model).specialisations[0].samples
    assert samples is not None
    seconds = samples.seconds / samples.count
    return {
        "milliseconds": milliseconds(times),
        "between samples over without": ratio(times, "sample{every=1000000}", "eager"),
        "a sample, ms": round(1e3 * seconds, 2),
        "a sample, steps": round(seconds / statistics.median(times["eager"]), 2),
    }


def _rank(rank: int, port: int, queue: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    for name in MODELS:
        _, step = _step(name, f"sample{{every={EVERY}}}")
        times = []
        for _ in range(5 * EVERY + 1):
            start = time.perf_counter()
            step()
            times.append(time.perf_counter() - start)
        sampled = times[EVERY::EVERY]
        others = [t for i, t in enumerate(times[2:], 2) if i % EVERY]
        if rank == 0:
            queue.put((name, statistics.median(sampled), statistics.median(others)))
    dist.destroy_process_group()


def _on_ranks() -> dict[str, object]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    queue = mp.get_context("spawn").Queue()
    mp.spawn(_rank, args=(port, queue), nprocs=2)  # type: ignore[no-untyped-call]
    found = {}
    for _ in MODELS:
        name, sampled, other = queue.get()
        found[name] = {
            "a step, ms": round(1e3 * other, 2),
            "a sampled step, ms": round(1e3 * sampled, 2),
            "a sampled step, steps": round(sampled / other, 2),
        }
    return found


def main() -> None:
    torch.set_num_threads(1)
    results: dict[str, object] = {}
    for name in MODELS:
        results[name] = _alone(name)
        print(name, results[name], flush=True)
    results["two ranks"] = _on_ranks()
    print("two ranks", results["two ranks"])
    print("kept in", keep("sampling_cpu", results).name)


if __name__ == "__main__":
    main()
