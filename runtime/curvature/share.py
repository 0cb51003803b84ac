"""Who does what at the end of a step: here one rank, which does everything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from graphopt.curvature import Curvature
from graphopt.runtime.accumulation import Accumulation
from graphopt.runtime.curvature.state import CurvatureState


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


def share(curvature: Curvature, accumulation: Accumulation) -> Share:
    """How the ranks of a job divide the work; on one rank it is not divided."""
    return Alone()
