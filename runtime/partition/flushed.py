"""A step that ends with an empty pipeline: this rank's line of a synchronous schedule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from graphopt.plan import Phase
from graphopt.runtime.engine.step import Step
from graphopt.runtime.partition.update import Gathered, finish, gradients_of
from graphopt.runtime.partition.work import Task, Work
from graphopt.schedules.actions import Action, Kind

# Receives that are posted before the one that is needed next.
AHEAD = 2

_PARTS = {Kind.B: 0, Kind.I: 0, Kind.W: 1}
_RECEIVES = {Kind.RECV_F: Phase.FORWARD, Kind.RECV_B: Phase.BACKWARD}


@dataclass(eq=False)
class Ending:
    """What a step of this rank ends with.

    Attributes:
        gradients: of its parameters, over all micro-batches, by name.
        shares: of gradients that several stages add up.
        step: of the last micro-batch.
    """

    gradients: dict[str, Tensor] = field(default_factory=dict)
    shares: dict[str, Any] = field(default_factory=dict)
    step: Step = field(default_factory=Step)


def run(work: Work, line: Sequence[Action], tasks: Sequence[Task]) -> Ending:
    """Do all actions of a rank in order.

    Args:
        work: does them.
        line: with sends and receives, whose order is the one in which receives are posted.
        tasks: all micro-batches.
    """
    ending = Ending()
    gathered: dict[int, Gathered] = {}
    partials: dict[int, Gathered] = {}
    last = {a.stage: a for a in line if a.kind in (Kind.B, Kind.W)}
    receives = [a for a in line if a.kind in _RECEIVES]
    posted = 0
    for action in line:
        kind, stage, task = action.kind, action.stage, tasks[action.micro_batch]
        if kind in _RECEIVES:
            here = receives.index(action, max(0, posted - AHEAD - 1))
            while posted < min(len(receives), here + 1 + AHEAD):
                _ask(work, receives[posted], tasks)
                posted += 1
        elif kind is Kind.F:
            task.ends = last[stage].micro_batch == task.number
            work.forward(stage, task)
        elif kind in _PARTS:
            sums = gathered.setdefault(stage, Gathered())
            adds = sums if sums.count and kind is not Kind.I else None
            step, shares, results = work.backward(stage, task, _PARTS[kind], adds)
            if kind is Kind.I:
                continue
            sums.set(gradients_of(results, step.parameters))
            partials.setdefault(stage, Gathered()).add(shares)
            if not step.ends:
                finish(work.session, task.engine, step, {})
                continue
            ending.gradients.update(sums.take())
            ending.shares.update(partials[stage].take())
            ending.step = step
    return ending


def _ask(work: Work, action: Action, tasks: Sequence[Task]) -> None:
    work.ask(_RECEIVES[action.kind], action.stage, tasks[action.micro_batch])
