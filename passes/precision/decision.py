"""Who decides, and by what: times, the cut or the rules, the budget; the same on all ranks."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from torch import fx

from graphopt.errors import RankError
from graphopt.graph import Graph
from graphopt.passbase import Communicator
from graphopt.passes.precision.formats import Format
from graphopt.passes.precision.front import Point, sweep, within
from graphopt.passes.precision.kept import data_of, kept_times, names_of, times_of
from graphopt.passes.precision.mincut import Noise, Times, minimum_cut
from graphopt.passes.precision.problem import Problem
from graphopt.passes.precision.rules import kinds
from graphopt.passes.precision.tf import propagate
from graphopt.passes.precision.times import assumed_times


@dataclass(frozen=True)
class Decision:
    """A choice, and what it was made by.

    Attributes:
        low: the units to lower.
        times: of everything, those that decided.
        source: where they are from: ``"measured"``, ``"kept"`` of an earlier run, ``"roofline"``.
        front: the choices between the fastest and the most exact; empty without a calibration.
    """

    low: frozenset[fx.Node]
    times: Times
    source: str
    front: tuple[Point, ...] = ()


@dataclass(frozen=True)
class Question:
    """What is to be decided, and how.

    Attributes:
        graph: in float32.
        problem: its units.
        format: the lower one.
        policy: ``mincut`` or ``tf``.
        cost: ``measure`` or ``roofline``.
        follow: see `minimum_cut`.
        noise: by a calibration, if there is one.
        budget: the largest change of the loss; 0 for any.
    """

    graph: Graph
    problem: Problem
    format: Format
    policy: str
    cost: str
    follow: bool
    noise: Noise | None = None
    budget: float = 0.0

    def answer(self) -> Decision:
        """Decided here."""
        times, source = self._times()
        if self.policy == "tf":
            low = propagate(self.problem, kinds(self.graph, self.format))
            return Decision(low, times, source)
        if self.noise is None:
            return Decision(minimum_cut(self.problem, times, self.follow), times, source)
        front = sweep(self.problem, times, self.noise, self.follow)
        if self.budget:
            return Decision(within(front, self.budget).low, times, source, front)
        return Decision(minimum_cut(self.problem, times, self.follow), times, source, front)

    def _times(self) -> tuple[Times, str]:
        if self.cost == "measure":
            return kept_times(self.graph, self.problem, self.format)
        return assumed_times(self.graph, self.problem, self.format), "roofline"


def decide(question: Question, ranks: Communicator | None, known: str) -> Decision:
    """The decision; where times are measured in a job it is rank 0's, with rank 0's times.

    Args:
        question: what is to be decided.
        ranks: those of the job.
        known: what the ranks must have in common, beside the problem.
    """
    if ranks is None or ranks.size == 1 or question.cost != "measure":
        return question.answer()
    problem = question.problem

    def here() -> str:
        return json.dumps(_data(problem, question.answer()))

    return _read(
        problem, json.loads(ranks.agree("precision", f"{known}\n{names_of(problem)}", here))
    )


def _data(problem: Problem, made: Decision) -> dict[str, Any]:
    place = {node: index for index, node in enumerate(problem.units)}
    return {
        "low": sorted(place[n] for n in made.low),
        "times": data_of(problem, made.times),
        "source": made.source,
        "front": [[sorted(place[n] for n in p.low), p.seconds, p.change] for p in made.front],
    }


def _read(problem: Problem, data: Any) -> Decision:
    units = list(problem.units)

    def nodes(places: list[int]) -> frozenset[fx.Node]:
        return frozenset(units[i] for i in places)

    times = times_of(problem, data["times"])
    if times is None:
        raise RankError(
            "rank 0 has sent times of other operators",
            hint="run the same version of graphopt on all ranks",
        )
    front = tuple(Point(nodes(low), seconds, change) for low, seconds, change in data["front"])
    return Decision(nodes(data["low"]), times, data["source"], front)
