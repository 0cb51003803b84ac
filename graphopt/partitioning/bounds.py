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
    """

    forward: float
    backward: float
    whole: float
    total: float

    def of(self, objective: Objective) -> float:
        """The bound of an objective."""
        if objective.kind == GPIPE:
            return self.forward + self.backward
        if objective.kind == ALPA:
            return self.total + (objective.micro_batches - 1) * self.whole
        return self.whole


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
    )
