"""Generated measurements of a field on the unit square."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from graphopt.hierarchical.kernels import Matern32

# What the field is drawn from, and the regression has to find.
SCALES = (0.35, 0.12)
VARIANCE = 1.0
NOISE = 0.04


@dataclass(frozen=True)
class Field:
    """A draw of the Matern process of smoothness 3/2.

    Attributes:
        points: [n, 2] where it was measured.
        values: [n] the measurements, with noise.
        grid: [side * side, 2] where it is known; the second coordinate varies fastest.
        truth: [side * side] its values there.
    """

    points: Tensor
    values: Tensor
    grid: Tensor
    truth: Tensor


def draw_field(count: int, side: int, generator: torch.Generator) -> Field:
    """Measurements at random points, more of them on the left; exact, by a dense factor."""
    points = torch.rand(count, 2, dtype=torch.float64, generator=generator)
    points[:, 0] = points[:, 0] ** 1.5
    line = (torch.arange(side, dtype=torch.float64) + 0.5) / side
    grid = torch.cartesian_prod(line, line)
    everywhere = torch.cat([points, grid])
    covariance = Matern32(torch.tensor(SCALES, dtype=torch.float64), VARIANCE)(
        everywhere, everywhere
    )
    covariance.diagonal().add_(1e-10)
    normal = torch.randn(len(everywhere), dtype=torch.float64, generator=generator)
    field = torch.linalg.cholesky(covariance) @ normal
    noise = NOISE**0.5 * torch.randn(count, dtype=torch.float64, generator=generator)
    return Field(points, field[:count] + noise, grid, field[count:])
