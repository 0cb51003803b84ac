"""What no partition can beat: averages and the largest atom."""

from __future__ import annotations

import math
from dataclasses import dataclass

from graphopt.partitioning.atoms import Atoms
from graphopt.partitioning.objective import ALPA, GPIPE, Objective


@dataclass(frozen=True)
class Bounds:
    """Lower bounds of what the objectives are made of, in seconds.

    Attributes:
        forward: of the slowest forward.
        backward: of the slowest backward.
        whole: of the slowest stage.
        total: of the sum over all stages and cuts.
        total_forward: the part of it that is forward computation.
    """

    forward: float
    backward: float
    whole: float
    total: float
    total_forward: float

    def of(self, objective: Objective) -> float:
        """The bound of an objective."""
        if objective.kind == GPIPE:
            return self.forward + self.backward
        if objective.kind == ALPA:
            return self.total + (objective.micro_batches - 1) * self.whole
        return self.whole

    def with_cuts(
        self, stages: int, forward: float, backward: float, both: float, *, overlap: bool
    ) -> Bounds:
        """The same where each cut takes at least so many seconds, and waits for two stages or none.

        Args:
            stages: how many.
            forward: seconds forward over any cut.
            backward: seconds back over any cut.
            both: seconds of both over any cut.
            overlap: whether transfers run beside the computation.
        """
        cuts = stages - 1

        def slowest(bound: float, total: float, cut: float) -> float:
            return (
                max(bound, cut if cuts else 0.0)
                if overlap
                else max(bound, (total + 2 * cuts * cut) / stages)
            )

        return Bounds(
            slowest(self.forward, self.total_forward, forward),
            slowest(self.backward, self.total - self.total_forward, backward),
            slowest(self.whole, self.total, both),
            self.total + cuts * both,
            self.total_forward,
        )


def bounds_of(atoms: Atoms, stages: int) -> Bounds:
    """One of `stages` stages has at least the average, and one has the largest atom."""
    whole = [f + b for f, b in zip(atoms.forward, atoms.backward, strict=True)]

    def slowest(seconds: list[float] | tuple[float, ...]) -> float:
        return max(math.fsum(seconds) / stages, max(seconds))

    return Bounds(
        forward=slowest(atoms.forward),
        backward=slowest(atoms.backward),
        whole=slowest(whole),
        total=math.fsum(whole),
        total_forward=math.fsum(atoms.forward),
    )
