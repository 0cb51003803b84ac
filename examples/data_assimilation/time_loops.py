"""Ways to give a loop over time to a compiler, measured on the pendulum's training step.

Run as ``python -m graphopt.examples.data_assimilation.time_loops``.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch._higher_order_ops.scan import scan

from graphopt.api import optimize
from graphopt.errors import GraphoptError
from graphopt.examples.data_assimilation.data import PENDULUM, trajectories
from graphopt.examples.data_assimilation.model import DeepBayesianFilter, negative_elbo
from graphopt.examples.data_assimilation.parallel import Element, beliefs_in_parallel
from graphopt.examples.data_assimilation.recursion import (
    Belief,
    beliefs_in_sequence,
    predict,
    update,
)
from graphopt.examples.data_assimilation.train import BATCH, ONE_PENDULUM, TIMES
from graphopt.model.surface import report

Step = Callable[[Tensor, Tensor, Tensor], Tensor]


class InParallel(DeepBayesianFilter):
    """All time steps at once, without a loop."""

    def filter(self, observations: Tensor, before: Belief) -> tuple[Belief, Belief, Belief]:
        precision, information = self.evidence(observations)
        transition, noise = (part.unsqueeze(2) for part in self.dynamics())
        elements = Element(
            precision,
            information,
            transition.expand_as(precision),
            torch.zeros_like(information),
            noise.expand_as(precision),
        )
        first = Belief(*(part.unsqueeze(-2) for part in before))
        beliefs = beliefs_in_parallel(first, elements)
        priors = Belief(*(part[..., :-1, :] for part in beliefs))
        following = Belief(*(part[..., -1, :] for part in beliefs))
        return priors, update(priors, precision, information), following


class InScan(DeepBayesianFilter):
    """The loop as one higher-order operator that holds the graph of a time step."""

    def filter(self, observations: Tensor, before: Belief) -> tuple[Belief, Belief, Belief]:
        precision, information = self.evidence(observations)
        transition, noise = self.dynamics()

        def step(
            carry: tuple[Tensor, ...], seen: tuple[Tensor, ...]
        ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
            following = predict(update(Belief(*carry), *seen), transition, noise)
            return tuple(following), tuple(part.clone() for part in carry)

        evidence = (precision.movedim(-2, 0), information.movedim(-2, 0))
        following, priors = scan(step, tuple(before), evidence)
        before_each = Belief(*(part.movedim(0, -2) for part in priors))
        return before_each, update(before_each, precision, information), Belief(*following)


class Recursion(nn.Module):
    """Only the recursion of some time steps; the networks are elsewhere."""

    def __init__(self, model: DeepBayesianFilter) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, precision: Tensor, information: Tensor, mean: Tensor, covariance: Tensor
    ) -> tuple[Tensor, ...]:
        before, following = beliefs_in_sequence(
            Belief(mean, covariance), *self.model.dynamics(), precision, information
        )
        return *before, *following


class Evidence(nn.Module):
    """The networks that read observations, for all time steps at once."""

    def __init__(self, model: DeepBayesianFilter) -> None:
        super().__init__()
        self.model = model

    def forward(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        return self.model.evidence(observations)


class Loss(nn.Module):
    """What follows the recursion, for all time steps at once."""

    def __init__(self, model: DeepBayesianFilter) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        precision: Tensor,
        information: Tensor,
        states: Tensor,
        noise: Tensor,
        mean: Tensor,
        covariance: Tensor,
    ) -> Tensor:
        prior = Belief(mean, covariance)
        posterior = update(prior, precision, information)
        return self.model.loss(prior, posterior, states, noise)


def whole(model: DeepBayesianFilter, backend: str, steps: int) -> tuple[Step, list[nn.Module]]:
    """A training step by one model that takes ``steps`` time steps per call."""
    if backend != "none":
        optimize(model, backend=backend)

    def step(observations: Tensor, states: Tensor, noise: Tensor) -> Tensor:
        return negative_elbo(model, observations, states, noise, model.initial(BATCH), steps)

    return step, [model]


def in_three(model: DeepBayesianFilter, backend: str, steps: int) -> tuple[Step, list[nn.Module]]:
    """A training step whose networks see all times at once; only the recursion is in calls."""
    evidence, recursion, loss = Evidence(model), Recursion(model), Loss(model)
    parts: list[nn.Module] = [evidence, recursion, loss]
    if backend != "none":
        for part in parts:
            optimize(part, backend=backend)

    def step(observations: Tensor, states: Tensor, noise: Tensor) -> Tensor:
        precision, information = evidence(observations)
        belief = list(model.initial(BATCH))
        before = []
        calls = (torch.split(part, steps, -2) for part in (precision, information))
        for seen in zip(*calls, strict=True):
            mean, covariance, *belief = recursion(*seen, *belief)
            before.append((mean, covariance))
        priors = [torch.cat(part, -2) for part in zip(*before, strict=True)]
        value: Tensor = loss(precision, information, states, noise, *priors)
        return value / TIMES

    return step, parts


Make = Callable[[DeepBayesianFilter, str, int], tuple[Step, list[nn.Module]]]
FORMS: dict[str, tuple[type[DeepBayesianFilter], Make, int]] = {
    "unrolled": (DeepBayesianFilter, whole, TIMES),
    "cell of 1 step": (DeepBayesianFilter, whole, 1),
    "cell of 3 steps": (DeepBayesianFilter, whole, 3),
    "cell of 5 steps": (DeepBayesianFilter, whole, 5),
    "cell of 10 steps": (DeepBayesianFilter, whole, 10),
    "networks outside, cell of 5 steps": (DeepBayesianFilter, in_three, 5),
    "in parallel": (InParallel, whole, TIMES),
    "scan operator": (InScan, whole, TIMES),
}


def cpu_seconds() -> float:
    """Of this process and of the compilers that it has started."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def measure(form: str, backend: str, repeat: int) -> tuple[int, float, float]:
    """Nodes of graphs, CPU seconds of the first step, median CPU milliseconds of later ones."""
    kind, make, steps = FORMS[form]
    torch.manual_seed(0)
    setting = ONE_PENDULUM
    model = kind(1, 2, planes=setting.planes, width=setting.width, fastest=setting.fastest)
    step, optimized = make(model, backend, steps)
    drawn = trajectories(PENDULUM, BATCH, TIMES, torch.Generator().manual_seed(0))
    noise = torch.randn(2, BATCH, TIMES, model.planes, dtype=torch.float64)
    batch = drawn.observations.float(), drawn.states.float(), noise

    def once() -> float:
        start = time.process_time()
        step(*batch).backward()  # type: ignore[no-untyped-call]
        return 1000 * (time.process_time() - start)

    start = cpu_seconds()
    once()
    first = cpu_seconds() - start
    later = sorted(once() for _ in range(repeat))
    nodes = 0
    if backend != "none":
        nodes = sum(s.steps[-1].nodes_after for m in optimized for s in report(m).specialisations)
    return nodes, first, later[repeat // 2]


def main() -> None:
    """Measure some forms in some backends."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--form", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--backend", nargs="+", default=["none", "eager", "inductor"])
    parser.add_argument("--repeat", type=int, default=15)
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
