"""Who does what at the end of a step: one rank everything, several ranks a part each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from graphopt.plan import Plan
from graphopt.runtime.accumulation import Accumulation
from graphopt.runtime.kfac.state import CurvatureState
from graphopt.runtime.kfac.together import Division, Together
from graphopt.runtime.ranks.workers import Workers


class Share(Protocol):
    """Divides the work of a step's curvature between ranks."""

    def step(
        self,
        curvature: CurvatureState,
        gradients: Mapping[str, Tensor],
        fresh: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """Renew statistics and solutions, and precondition.

        Args:
            curvature: of this rank.
            gradients: of the whole step by parameter name.
            fresh: statistics, and rows of examples, that this step computed.

        Returns:
            Preconditioned gradients by parameter name.
        """


class Alone:
    """One rank keeps all blocks."""

    def step(
        self,
        curvature: CurvatureState,
        gradients: Mapping[str, Tensor],
        fresh: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """See `Share.step`."""
        blocks = curvature.curvature.blocks
        curvature.take_over(blocks, fresh)
        return curvature.precondition(blocks, gradients)


def share(plan: Plan, accumulation: Accumulation) -> Share:
    """How the ranks of a job divide the work; on one rank it is not divided.

    Args:
        plan: with a curvature; where it has no grouping, gradients are averaged here.
        accumulation: the ranks.
    """
    assert plan.curvature is not None
    if not isinstance(accumulation, Workers) or accumulation.size == 1:
        return Alone()
    division = Division.of(accumulation, plan.curvature.fraction)
    return Together(division, reduces=plan.grouping is None)
