"""Ranks whose gradients become ready in different orders: no deadlock, and right means.

Each case is a model of a trunk and branches, and eight steps. Every rank runs the branches in an
order of its own, which is the reverse of the order in which their gradients are ready; in each step
it uses only some of them in its loss, waits before its forward and in the middle of its backward,
and accumulates as many micro-batches as all. Some ranks have an operator somewhere else, so that
the order of rank 0 is no order of theirs. The expected means are computed on each rank by itself,
with plain PyTorch.

``python -m benchmarks.rank_orders 90,35`` runs that many models on two and on three ranks, and
keeps ``benchmarks/results/rank_orders.json``. A deadlock ends the run after `TIMEOUT` seconds.
"""

from __future__ import annotations

import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn  # before there is a group, which it would hold until exit
import torch.multiprocessing as mp
from torch import Tensor, nn

import graphopt
from benchmarks.harness import keep
from graphopt.model.surface import report
from graphopt.network.curve import Curve
from graphopt.passes import group_gradients, schedule
from graphopt.passes.schedule import search
from graphopt.passes.schedule.order import Order, Task
from graphopt.plan.group_gradients import Reduction

TIMEOUT = 900  # seconds that a rank waits for a message, a stopped machine included
# Slow enough that small gradients are worth several messages.
LINK = Curve.affine(1e-6, 2e-8, "50 MB/s, assumed")
LONGEST_WAIT = 0.004  # seconds
STEPS = 8  # of each model
REORDERED = "models reordered on this rank"
RELATIVE, ABSOLUTE = 1e-4, 1e-6


@dataclass(frozen=True)
class Step:
    """What one rank does in a step.

    Attributes:
        used: branches that are in the loss, for each micro-batch.
        wait: seconds before each forward.
        stall: seconds within each backward, at the gradient of the first branch that is used.
    """

    used: tuple[tuple[int, ...], ...]
    wait: float
    stall: float


@dataclass(frozen=True)
class RankCase:
    """What one rank does.

    Attributes:
        order: in which the forward runs the branches.
        other: the branch that has one activation more here.
        steps: `STEPS` of them.
    """

    order: tuple[int, ...]
    other: int
    steps: tuple[Step, ...]


@dataclass(frozen=True)
class Case:
    """A model, and what each rank does with it.

    Attributes:
        seed: of weights and batches.
        widths: of each branch.
        ranks: one entry per rank.
    """

    seed: int
    widths: tuple[int, ...]
    ranks: tuple[RankCase, ...]


def generated(seed: int, world: int) -> Case:
    """The case with this number."""
    draw = random.Random(1000 * seed + world)
    widths = tuple(draw.choice((3, 8, 24, 40)) for _ in range(draw.randint(2, 5)))
    branches = range(len(widths))
    micro_batches = [draw.choice((1, 1, 2, 3)) for _ in range(STEPS)]

    def step(count: int) -> Step:
        sizes = [draw.choice((len(widths), draw.randint(1, len(widths)))) for _ in range(count)]
        return Step(
            used=tuple(tuple(sorted(draw.sample(branches, size))) for size in sizes),
            wait=draw.choice((0.0, draw.uniform(0, LONGEST_WAIT))),
            stall=draw.choice((0.0, draw.uniform(0, LONGEST_WAIT))),
        )

    def rank() -> RankCase:
        return RankCase(
            order=tuple(draw.sample(branches, len(widths))),
            other=draw.choice((0, 0, draw.choice(branches))),
            steps=tuple(step(count) for count in micro_batches),
        )

    return Case(seed, widths, tuple(rank() for _ in range(world)))


class Branches(nn.Module):
    """A trunk and branches that run in a given order; each gives one output, in its own place."""

    def __init__(self, case: Case, mine: RankCase) -> None:
        super().__init__()
        torch.manual_seed(case.seed)
        self.trunk = nn.Linear(6, 10)
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Linear(10, width), nn.Tanh(), nn.Linear(width, 3))
            for width in case.widths
        )
        self.mine = mine

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        hidden = torch.tanh(self.trunk(x))
        found = {}
        for index in self.mine.order:
            into = torch.sigmoid(hidden) if index == self.mine.other else hidden
            found[index] = self.branches[index](into)
        return tuple(found[index] for index in range(len(found)))


def backwards(case: Case, rank: int, number: int, model: Any, stalls: bool) -> None:
    """The micro-batches of a step of a rank, one after the other."""
    step = case.ranks[rank].steps[number]
    for micro, used in enumerate(step.used):
        last = micro == len(step.used) - 1
        seed = ((100 * case.seed + number) * 10 + micro) * 10 + rank
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(seed))
        if stalls:
            time.sleep(step.wait)
        with model.no_sync() if stalls and not last else nullcontext():
            outputs = model(x)
            if stalls and step.stall:
                outputs[used[0]].register_hook(lambda _: time.sleep(step.stall))
            torch.stack([outputs[i].square().mean() for i in used]).sum().backward()


def expected(case: Case, number: int) -> dict[str, Tensor | None]:
    """The mean over ranks of their gradients of a step, zeros for those that a rank lacks."""
    sums: dict[str, Tensor | None] = {}
    for rank, mine in enumerate(case.ranks):
        model = Branches(case, mine)
        backwards(case, rank, number, model, stalls=False)
        for name, parameter in model.named_parameters():
            before, grad = sums.get(name), parameter.grad
            if grad is not None:
                sums[name] = grad / len(case.ranks) + (0 if before is None else before)
            else:
                sums.setdefault(name, None)
    return sums


def run_case(case: Case, rank: int) -> dict[str, int]:
    """The steps of one rank; how many of them, and what was special about them.

    Raises:
        AssertionError: a gradient is not the mean over ranks.
    """
    mine = case.ranks[rank]
    model: Any = graphopt.optimize(
        Branches(case, mine),
        passes="cleanup,schedule{memory=10},group_gradients",
        backend="eager",
        verify="off",
    )
    for number in range(STEPS):
        means = expected(case, number)
        model.zero_grad(set_to_none=True)
        backwards(case, rank, number, model, stalls=True)
        for name, parameter in model.named_parameters():
            mean = means[name]
            assert (parameter.grad is None) == (mean is None), (case, number, name)
            if mean is not None:
                torch.testing.assert_close(
                    parameter.grad, mean, rtol=RELATIVE, atol=ABSOLUTE, msg=f"{case} {name}"
                )
    (made,) = report(model).specialisations
    part = made.plan.part(Reduction)
    assert part is not None
    steps = list(zip(*(one.steps for one in case.ranks), strict=True))
    return {
        "models": 1,
        "models with other orders than rank 0's": len({one.order for one in case.ranks}) > 1,
        "models with an operator elsewhere than on rank 0": len({one.other for one in case.ranks})
        > 1,
        "models with several messages": len(part.grouping.groups) > 1,
        REORDERED: any(s.outcome.applied for s in made.steps if s.spec.startswith("schedule")),
        "steps": len(steps),
        "steps with gradients that only some ranks have": sum(
            len({frozenset(i for some in one.used for i in some) for one in step}) > 1
            for step in steps
        ),
        "steps with several micro-batches": sum(len(step[0].used) > 1 for step in steps),
    }


def run_cases(rank: int, world: int, seeds: range, *, drawn: bool = False) -> Counter[str]:
    """All cases on this rank, one after the other; orders that are found are taken untried.

    Args:
        rank: this one.
        world: number of ranks.
        seeds: of the cases.
        drawn: whether each order is drawn from all legal ones. Which ones are searched and found
            depends on measured times, and often none is.
    """
    # Links of the job itself would all be alike, and so fast that one message is best.
    schedule.link_curve = group_gradients.link_curve = lambda *_: LINK
    schedule.confirmed = lambda choice, ratios: choice
    counts: Counter[str] = Counter()
    for seed in seeds:
        if drawn:
            search.LEAST_GAIN = float("-inf")
            search.best_first = partial(drawn_order, seed)
        torch._dynamo.reset()
        counts.update(run_case(generated(seed, world), rank))
    return counts


def drawn_order(seed: int, tasks: Sequence[Task], *_: object) -> list[tuple[float, str, Order]]:
    """In the form of `best_first`: one order, in which tasks stand behind those that they need."""
    draw = random.Random(seed)
    order: list[int] = []
    while len(order) < len(tasks):
        may_run = [
            index
            for index, task in enumerate(tasks)
            if index not in order and (task.after < 0 or task.after in order)
        ]
        order.append(draw.choice(may_run))
    return [(0.0, "drawn", tuple(order))]


def _rank(rank: int, world: int, folder: str, count: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=TIMEOUT),
    )
    found = run_cases(rank, world, range(count))
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()  # no rank leaves while another may still talk to it
    sys.stdout.flush()
    os._exit(0)  # threads of Gloo may outlive the interpreter and abort


def main(counts: str) -> None:
    results: dict[str, Any] = {}
    for world, count in enumerate(map(int, counts.split(",")), start=2):
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(_rank, (world, folder, count), nprocs=world)
            told = [json.loads((Path(folder) / f"{r}.json").read_text()) for r in range(world)]
        results[f"{world} ranks"] = {
            **told[0],
            REORDERED: [one[REORDERED] for one in told],
            "deadlocks": 0,  # one would have ended the run
            "wrong means": 0,  # so would one of these
            "seconds": round(time.perf_counter() - began, 1),
        }
        print(world, "ranks:", results[f"{world} ranks"], flush=True)
        keep("rank_orders", results)


if __name__ == "__main__":
    main(sys.argv[1])
