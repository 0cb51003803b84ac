"""How many graphs a hundred lengths and ten batch sizes take, and whether they have eager's bits.

Every step of seven models is compared with eager's: loss, gradients and buffers, bit by bit. Where
they differ, a graph captured for that size alone says whether symbols are the reason. Run
``python -m benchmarks.sizes [NAME ...]``; models that were not named keep what they had in
``benchmarks/results/sizes.json``.
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
from torch import Tensor, nn

import graphopt
from benchmarks.harness import RESULTS, keep
from benchmarks.sizes_models import CASES, Batch, Case
from graphopt.model.controller import controller_of

LENGTHS = 100
BATCHES = (2, 3, 4, 5, 6, 7, 8, 9, 11, 16)


def sizes_of(case: Case, count: int = LENGTHS, seed: int = 0) -> list[tuple[int, int]]:
    """Pairs of batch size and length; lengths are distinct as far as there are so many."""
    order = random.Random(seed)
    lengths: list[int] = []
    while len(lengths) < count:
        lengths += order.sample(list(case.lengths), min(count - len(lengths), len(case.lengths)))
    batches = [BATCHES[i % len(BATCHES)] for i in range(count)]
    order.shuffle(batches)
    return list(zip(batches, lengths, strict=True))


def data(case: Case, batch: int, length: int) -> Batch:
    """The batch of these sizes, the same at every call."""
    return case.batch(batch, length, torch.Generator().manual_seed(1000 * length + batch))


def step(case: Case, model: nn.Module, batch: Batch) -> list[Tensor]:
    """Loss, gradients and buffers of one training step."""
    for parameter in model.parameters():
        parameter.grad = None
    torch.manual_seed(0)
    loss = case.loss(model(**batch))
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return [loss.detach(), *gradients, *(b.detach().clone() for b in model.buffers())]


def equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    """Whether two steps have the same bits."""
    pairs = zip(found, expected, strict=True)
    return len(found) == len(expected) and all(
        torch.equal(
            a.nan_to_num() if a.is_floating_point() else a,
            b.nan_to_num() if b.is_floating_point() else b,
        )
        for a, b in pairs
    )


def measure(case: Case) -> dict[str, Any]:
    """A stream of steps of one model, each compared with eager's."""
    torch.manual_seed(0)
    plain = case.make()
    model = graphopt.optimize(copy.deepcopy(plain), backend="eager")
    controller = controller_of(model)
    assert controller is not None
    captures, seconds, unequal = [], 0.0, []
    shapes = sizes_of(case)
    for number, (batch, length) in enumerate(shapes):
        given, made = data(case, batch, length), controller.made
        start = time.process_time()
        found = step(case, model, given)
        if controller.made > made:
            captures.append(number)
            seconds += time.process_time() - start
        if not equal(found, step(case, plain, given)):
            unequal.append((batch, length))
    report = graphopt.model.surface.report(model)
    return {
        "steps": len(shapes),
        "captures": len(captures),
        "captured at": captures,
        "CPU seconds of captures": round(seconds, 1),
        "unequal to eager": unequal,
        "of these unequal without symbols": [s for s in unequal if not static_equal(case, *s)],
        "static graphs": sum(not entry.sizes for entry in report.specialisations[1:]),
        "plain": len(report.plain),
        "ranges": [str(size) for size in report.specialisations[-1].sizes],
        "notes": list(report.notes),
    }


def static_equal(case: Case, batch: int, length: int) -> bool:
    """Whether a graph for this size alone has eager's bits."""
    torch.manual_seed(0)
    plain = case.make()
    model = graphopt.optimize(
        copy.deepcopy(plain), backend="eager", dynamic=False, on_mismatch="warn"
    )
    given = data(case, batch, length)
    return equal(step(case, model, given), step(case, plain, given))


def main(names: list[str]) -> None:
    """Measure, print and keep."""
    path = RESULTS / "sizes.json"
    results = json.loads(path.read_text())["results"] if path.exists() else {}
    for name in names or CASES:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            results[name] = measure(CASES[name])
        print(name, json.dumps(results[name], indent=1), flush=True)
        keep("sizes", {n: results[n] for n in CASES if n in results})


if __name__ == "__main__":
    main(sys.argv[1:])
