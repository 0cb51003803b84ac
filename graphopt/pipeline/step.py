"""What one pass of a pipeline did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from graphopt.passbase import Numerics, Outcome
from graphopt.plan import PlanPart


@dataclass(frozen=True)
class PassStep:
    """What one pass of a pipeline did.

    Attributes:
        spec: the pass in the spec language.
        numerics: how far it may move the results.
        outcome: what was applied and what was declined.
        seconds: time of the pass itself.
        verify_seconds: time of checking the graph afterwards; on the first pass that ran, also of
            checking it before.
        nodes_before: size of the graph before.
        nodes_after: size of the graph after.
        skipped: why the pass did not run at all; empty if it ran.
        earlier: whether an earlier process has run it, so that it took no time in this one.
    """

    spec: str
    numerics: Numerics
    outcome: Outcome
    seconds: float
    verify_seconds: float
    nodes_before: int
    nodes_after: int
    skipped: str = ""
    earlier: bool = False


def parts_of(steps: Sequence[PassStep]) -> tuple[PlanPart, ...]:
    """What the passes of a pipeline have decided for the runtime, in order."""
    return tuple(step.outcome.part for step in steps if step.outcome.part is not None)
