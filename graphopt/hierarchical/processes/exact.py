"""Products with kernel matrices by all of their entries: time n^2, memory n."""

from __future__ import annotations

import torch
from torch import Tensor

from graphopt.hierarchical.kernels import Radial
from graphopt.hierarchical.rounding import gamma

# Entries of a block of this side fit into a cache.
_SIDE = 256


@torch.no_grad()
def product(kernel: Radial, points: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """``K x`` and a bound of the rounding error of each of its entries.

    Args:
        kernel: of which no entry is negative.
        points: [n, d] float64.
        x: [n, 1] float64.
    """
    n = len(points)
    both = torch.cat([x, x.abs()], 1)
    total = torch.zeros_like(both)
    largest = 0.0
    for start in range(0, n, _SIDE):
        rows = slice(start, start + _SIDE)
        here = kernel(points[rows], points[rows])
        largest = max(largest, float(here.abs().max()))
        total[rows] += here @ both[rows]
        for other in range(start + _SIDE, n, _SIDE):
            columns = slice(other, other + _SIDE)
            block = kernel(points[rows], points[columns])
            total[rows] += block @ both[columns]
            total[columns] += block.T @ both[rows]
    sums = gamma(_SIDE + n // _SIDE + 2, torch.float64)
    entries = float(kernel.rounding(torch.tensor(largest).double(), points.shape[1]))
    lost = 2 * sums * total[:, 1:] + entries * float(both[:, 1].sum())
    return total[:, :1], lost
