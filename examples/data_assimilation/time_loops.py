"""Ways to give a loop over time to a compiler, measured on the pendulum's training step.

Run as ``python -m graphopt.examples.data_assimilation.time_loops``. The unrolled form, whose graph
takes long to compile, is measured when it is asked for: ``--form unrolled --backend none eager``.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch._higher_order_ops.scan import scan

from graphopt.api import optimize
from graphopt.errors import GraphoptError
from graphopt.examples.common.arguments import positive
from graphopt.examples.data_assimilation.data import PENDULUM, trajectories
from graphopt.examples.data_assimilation.model import DeepBayesianFilter
from graphopt.examples.data_assimilation.parallel import Element, beliefs_in_parallel
from graphopt.examples.data_assimilation.recursion import (
    Belief,
    predict,
    update,
)
from graphopt.examples.data_assimilation.train import BATCH, ONE_PENDULUM, TIMES
from graphopt.model.surface import report


class InParallel(DeepBayesianFilter):
    """All time steps at once, without a loop."""

    def beliefs(self, precision: Tensor, information: Tensor) -> tuple[Belief, Belief]:
        transition, noise = (part.unsqueeze(2) for part in self.recursion.dynamics())
        elements = Element(
            precision,
            information,
            transition.expand_as(precision),
            torch.zeros_like(information),
            noise.expand_as(precision),
        )
        start = Belief(*(part.unsqueeze(-2) for part in self.initial(precision.shape[2])))
        beliefs = beliefs_in_parallel(start, elements)
        priors = Belief(*(part[..., :-1, :] for part in beliefs))
        return priors, Belief(*(part[..., -1, :] for part in beliefs))


class InScan(DeepBayesianFilter):
    """The loop as one higher-order operator that holds the graph of a time step."""

    def beliefs(self, precision: Tensor, information: Tensor) -> tuple[Belief, Belief]:
        transition, noise = self.recursion.dynamics()

        def step(
            carry: tuple[Tensor, ...], seen: tuple[Tensor, ...]
        ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
            following = predict(update(Belief(*carry), *seen), transition, noise)
            return tuple(following), tuple(part.clone() for part in carry)

        evidence = (precision.movedim(-2, 0), information.movedim(-2, 0))
        following, priors = scan(step, tuple(self.initial(precision.shape[2])), evidence)
        return Belief(*(part.movedim(0, -2) for part in priors)), Belief(*following)


class Cell(nn.Module):
    """Networks, recursion and loss of a few time steps."""

    def __init__(self, model: DeepBayesianFilter) -> None:
        super().__init__()
        self.evidence, self.recursion = model.evidence, model.recursion
        self.likelihood = model.likelihood

    def forward(
        self, observations: Tensor, states: Tensor, noise: Tensor, mean: Tensor, covariance: Tensor
    ) -> tuple[Tensor, Belief]:
        precision, information = self.evidence(observations)
        priors, following = self.recursion(precision, information, mean, covariance)
        return self.likelihood(priors, precision, information, states, noise), following


class InCells(DeepBayesianFilter):
    """All that belongs to a few time steps in one call."""

    def __init__(self, observed: int, states: int, **options: Any) -> None:
        super().__init__(observed, states, **options)
        self.cell = Cell(self)

    def forward(self, observations: Tensor, states: Tensor, noise: Tensor) -> Tensor:
        before = self.initial(len(observations))
        calls = (torch.split(part, self.steps, -2) for part in (observations, states, noise))
        losses = []
        for chunk in zip(*calls, strict=True):
            loss, before = self.cell(*chunk, *before)
            losses.append(loss)
        return torch.stack(losses).mean()


def whole(model: DeepBayesianFilter) -> list[nn.Module]:
    """The training step is one graph."""
    return [model]


def in_three(model: DeepBayesianFilter) -> list[nn.Module]:
    """The recursion has a graph of its own, of some time steps."""
    return [model.evidence, model.recursion, model.likelihood]


def in_cells(model: DeepBayesianFilter) -> list[nn.Module]:
    """All that belongs to some time steps is one graph."""
    assert isinstance(model, InCells)
    return [model.cell]


Parts = Callable[[DeepBayesianFilter], list[nn.Module]]
FORMS: dict[str, tuple[type[DeepBayesianFilter], Parts, int]] = {
    "unrolled": (DeepBayesianFilter, whole, TIMES),
    "recursion, 1 step per call": (DeepBayesianFilter, in_three, 1),
    "recursion, 3 steps per call": (DeepBayesianFilter, in_three, 3),
    "recursion, 5 steps per call": (DeepBayesianFilter, in_three, 5),
    "recursion, 10 steps per call": (DeepBayesianFilter, in_three, 10),
    "everything, 1 step per call": (InCells, in_cells, 1),
    "everything, 5 steps per call": (InCells, in_cells, 5),
    "scan operator": (InScan, whole, TIMES),
    "in parallel": (InParallel, whole, TIMES),
}


def cpu_seconds() -> float:
    """Of this process and of the compilers that it has started."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def measure(form: str, backend: str, repeat: int) -> tuple[int, float, float]:
    """Nodes of graphs, CPU seconds of the first step, median CPU milliseconds of later ones."""
    kind, parts, steps = FORMS[form]
    torch.manual_seed(0)
    setting = ONE_PENDULUM
    model = kind(
        1, 2, planes=setting.planes, width=setting.width, fastest=setting.fastest, steps=steps
    )
    optimized = parts(model) if backend != "none" else []
    for part in optimized:
        optimize(part, backend=backend)
    drawn = trajectories(PENDULUM, BATCH, TIMES, torch.Generator().manual_seed(0))
    noise = torch.randn(2, BATCH, TIMES, model.planes, dtype=torch.float64)
    batch = drawn.observations.float(), drawn.states.float(), noise

    def once() -> float:
        start = time.process_time()
        loss: Tensor = model(*batch)
        loss.backward()
        return 1000 * (time.process_time() - start)

    start = cpu_seconds()
    once()
    first = cpu_seconds() - start
    later = sorted(once() for _ in range(repeat))
    nodes = sum(s.steps[-1].nodes_after for m in optimized for s in report(m).specialisations)
    return nodes, first, later[repeat // 2]


def main() -> None:
    """Measure some forms in some backends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--form", nargs="+", choices=FORMS, default=list(FORMS)[1:])
    parser.add_argument("--backend", nargs="+", default=["none", "eager", "inductor"])
    parser.add_argument("--repeat", type=positive, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    console = Console()
    table = Table("form", "backend", "nodes", "first step / CPU s", "later steps / CPU ms")
    for form in options.form:
        for backend in options.backend:
            try:
                nodes, first, later = measure(form, backend, options.repeat)
                row = [str(nodes or ""), f"{first:.1f}", f"{later:.1f}"]
            except GraphoptError as error:
                row = [str(error).splitlines()[0], "", ""]
            table.add_row(form, backend, *row)
            console.print(form, backend, *row)
    console.print(table)


if __name__ == "__main__":
    main()
