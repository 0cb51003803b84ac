"""A symmetric kernel matrix as `hodlr` takes it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from graphopt.errors import ArgumentError
from graphopt.hierarchical.clusters import ClusterTree
from graphopt.hierarchical.kernels import Kernel
from graphopt.hierarchical.matrix import HMatrix


class KernelOperator:
    """Products come from the blocks of a matrix, what is on the diagonal from the kernel.

    Args:
        matrix: made by `from_kernel` from one tree of points.
        kernel: the same.
    """

    def __init__(self, matrix: HMatrix, kernel: Kernel) -> None:
        if matrix.rows is not matrix.columns or matrix.rows.points is None:
            raise ArgumentError(
                "rows and columns are not the same points", hint="use from_kernel with one tree"
            )
        self.matrix = matrix
        self.kernel = kernel
        self._points = matrix.rows.points.to(matrix.dtype)

    @property
    def tree(self) -> ClusterTree:
        """See `Operator`."""
        return self.matrix.rows

    @property
    def dtype(self) -> torch.dtype:
        """See `Operator`."""
        return self.matrix.dtype

    @property
    def bound(self) -> float:
        """See `Operator`."""
        return self.matrix.bound

    @property
    def rounding(self) -> float:
        """See `Operator`."""
        return self.matrix.packed.rounding

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """See `Operator`."""
        return self.matrix.packed.parameters

    def product(self, values: Tensor, level: int | None = None) -> Tensor:
        """See `Operator`."""
        return self.matrix.packed.product(values, level)

    def inner_gradient(self, w: Tensor, v: Tensor, level: int | None = None) -> list[Tensor]:
        """See `Operator`."""
        return self.matrix.packed.inner_gradient(w, v, level)

    @torch.no_grad()
    def diagonal(self, level: int) -> Tensor:
        """See `Operator`."""
        blocks, filled = self._diagonal(level)
        return torch.where(filled, blocks(slice(None)), 0.0)

    def diagonal_gradient(self, level: int, weights: Tensor) -> list[Tensor]:
        """See `Operator`."""
        if not self.parameters:
            return []
        blocks, filled = self._diagonal(level)
        total = [torch.zeros_like(p) for p in self.parameters]
        step = max(1, 2**17 // weights[0].numel())
        for start in range(0, len(weights), step):
            part = slice(start, start + step)
            own = torch.where(filled[part], weights[part], 0.0)
            with torch.enable_grad():
                found = torch.autograd.grad(blocks(part), self.parameters, own, allow_unused=True)
            for sum_, gradient in zip(total, found, strict=True):
                if gradient is not None:
                    sum_.add_(gradient)
        return total

    def _diagonal(self, level: int) -> tuple[Callable[[slice], Tensor], Tensor]:
        """The blocks of a slice of clusters, and where they are filled: [c, m, m]."""
        positions = self.tree.positions[level]
        here = positions < len(self.tree)
        points = self._points[positions.clamp(max=len(self.tree) - 1)]
        filled = here.unsqueeze(2) & here.unsqueeze(1)

        def blocks(part: slice) -> Tensor:
            return self.kernel(points[part], points[part])

        return blocks, filled
