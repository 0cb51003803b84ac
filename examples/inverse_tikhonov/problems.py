"""Forward maps as PyTorch modules: a blur, and heat conduction solved inside the graph."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Deconvolution(nn.Module):
    """Gaussian blur on the unit interval, cut off at its ends.

    Args:
        cells: of the interval.
        width: standard deviation of the kernel, in units of the interval.
    """

    matrix: Tensor

    def __init__(self, cells: int, width: float) -> None:
        super().__init__()
        x = (torch.arange(cells, dtype=torch.float64) + 0.5) / cells
        kernel = torch.exp(-0.5 * ((x[:, None] - x) / width).square())
        self.register_buffer("matrix", kernel / (width * cells * (2 * torch.pi) ** 0.5))

    def forward(self, u: Tensor) -> Tensor:
        """Blurred u: (batch, cells) to (batch, cells)."""
        return u @ self.matrix.T


class HeatConduction(nn.Module):
    r"""Temperatures of a heated plate as a function of its log-conductivity u.

    -div(e^u grad w) = 1 in the unit square, w = 0 on the left edge, no flux through the others.
    Finite volumes; the conductivity of a face is the harmonic mean of its two cells. The linear
    system of each sample is assembled and solved in the graph, so that its backward pass is the
    adjoint equation.

    Args:
        side: cells along an edge.
        stride: every ``stride``-th cell along both axes is observed.
    """

    first: Tensor
    second: Tensor
    cooled: Tensor
    entries: Tensor
    observed: Tensor

    def __init__(self, side: int, stride: int) -> None:
        super().__init__()
        self.cells = side * side
        grid = torch.arange(self.cells).view(side, side)
        first = torch.cat([grid[:, :-1].reshape(-1), grid[:-1].reshape(-1)])
        second = torch.cat([grid[:, 1:].reshape(-1), grid[1:].reshape(-1)])
        cooled = grid[:, 0]
        rows = torch.cat([first, second, first, second, cooled])
        columns = torch.cat([first, second, second, first, cooled])
        self.register_buffer("first", first)
        self.register_buffer("second", second)
        self.register_buffer("cooled", cooled.clone())
        self.register_buffer("entries", rows * self.cells + columns)
        start = stride // 2
        self.register_buffer("observed", grid[start::stride, start::stride].reshape(-1).clone())

    def forward(self, u: Tensor) -> Tensor:
        """Temperatures (batch, observed) of log-conductivities (batch, cells)."""
        resistance = torch.exp(-u)
        faces = 2 / (
            resistance.index_select(1, self.first) + resistance.index_select(1, self.second)
        )
        # The edge is half a cell away from the middle of its cells.
        edge = 2 / resistance.index_select(1, self.cooled)
        values = torch.cat([faces, faces, -faces, -faces, edge], 1)
        system = u.new_zeros(len(u), self.cells**2).index_add(1, self.entries, values)
        heat = u.new_full((len(u), self.cells, 1), 1 / self.cells)
        solution: Tensor = torch.linalg.solve(system.view(-1, self.cells, self.cells), heat)
        return solution.squeeze(2).index_select(1, self.observed)
