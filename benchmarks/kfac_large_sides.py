"""Large K-FAC factors: low rank plus a diagonal, diagonal blocks, or whole; steps to a target.

The task of `examples/kfac_digits` with ``max_dim=128``, which the input sides of the second
convolution (144), the first linear layer (513) and the second one (129) exceed. Each variant has
five learning rates to choose from, with the two tuning seeds of `benchmarks.tuning`, and is
reported for the five others there. What the report of `kfac` says of the error is
noted after 20 steps, beside the true error of the dense factors of the same batch.

Run ``python -m benchmarks.kfac_large_sides`` (some ten minutes); it writes
``benchmarks/results/kfac_large_sides.json``.
"""

from __future__ import annotations

import statistics
import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import graphopt
from benchmarks.convergence import THREADS
from benchmarks.harness import keep
from benchmarks.tuning import SEEDS, TUNING_SEEDS, tune
from examples.kfac_digits import train as digits
from examples.kfac_digits.comparison import KFAC, Run, Task, train
from graphopt.model.controller import controller_of
from graphopt.ops.low_rank import bound, parts_of
from graphopt.runtime.kfac.packing import unpack

NAME = "kfac_large_sides"
MAX_DIM = 128
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
LOW_RANK = {f"rank {rank}": f"kfac{{max_dim={MAX_DIM},rank={rank}}}" for rank in (8, 16, 32)}
VARIANTS = {
    "whole": "kfac",
    "blocks": f"kfac{{max_dim={MAX_DIM},rank=0}}",
    **LOW_RANK,
}
STEPS_BEFORE_ERRORS = 20


def to_target(task: Task, rate: float) -> dict[str, Any]:
    """Steps of every seed, ``None`` where the target was not reached."""
    found: list[int | None] = []
    for seed in SEEDS:
        run = Run()
        for run in train(task, KFAC, rate, seed):
            if run.steps_to_target is not None:
                break
        found.append(run.steps_to_target)
    steps = sorted(float("inf") if s is None else s for s in found)
    middle = statistics.median(steps)
    return {
        "steps": found,
        "median": middle if middle < float("inf") else None,
        "reached": sum(s is not None for s in found),
    }


def errors(task: Task, rank: str) -> dict[str, dict[str, float]]:
    """What was told and what is true of the input sides, on one batch of a trained model."""
    found: dict[str, dict[str, float]] = {}
    states = [_state(task, spec) for spec in (LOW_RANK[rank], "kfac{interval=1}")]
    for key, value in states[0].items():
        name = key.removeprefix("now/")
        whole = states[1].get(key)
        if name == key or whole is None or whole.shape == value.shape:
            continue
        exact = unpack(whole)
        size = exact.shape[1]
        rows, diagonal = parts_of(value, size)
        stands_for = rows.mT @ rows
        stands_for.diagonal(dim1=1, dim2=2).copy_(diagonal)
        share, told = bound(value, size)
        true = float((stands_for - exact).norm() / exact.norm())
        found[name] = {"size": size, "trace left out": round(share, 4)}
        found[name] |= {"told error": round(told, 4), "true error": round(true, 4)}
    return found


def _state(task: Task, spec: str) -> dict[str, Tensor]:
    """Statistics of the batch after some steps of SGD, which are the same for every variant."""
    torch.manual_seed(0)
    model = task.model().train()
    batches = task.batches(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(STEPS_BEFORE_ERRORS):
        x, y = next(batches)
        optimizer.zero_grad()
        task.loss(model(x), y).backward()
        optimizer.step()
    x, y = next(batches)
    graphopt.optimize(model, (x,), passes=spec, backend="eager", verify="structure")
    task.loss(model(x), y).backward()
    controller = controller_of(model)
    assert controller is not None
    return dict(controller.session.state("kfac"))


def main() -> None:
    """Measure all variants, print and keep them."""
    torch.set_num_threads(THREADS)
    warnings.simplefilter("ignore", RuntimeWarning)
    results: dict[str, Any] = {"max_dim": MAX_DIM, "target": digits.task().target, "variants": {}}
    for name, spec in VARIANTS.items():
        task = replace(digits.task(), kfac=spec)
        chosen, tuning = tune(task, KFAC, RATES, TUNING_SEEDS)
        found = {"rate": chosen.rate, "tuning": tuning, **to_target(task, chosen.rate)}
        if name in LOW_RANK:
            found["errors"] = errors(task, name)
        results["variants"][name] = found
        print(name, {k: v for k, v in found.items() if k != "tuning"}, flush=True)
    print("kept in", keep(NAME, results).name)


if __name__ == "__main__":
    main()
