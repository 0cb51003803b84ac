"""A symmetric kernel matrix as `hodlr` takes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import cast

import torch
from torch import Tensor

from graphopt.errors import ArgumentError
from graphopt.hierarchical.clusters import ClusterTree
from graphopt.hierarchical.group_kinds import Coupled, Tiles
from graphopt.hierarchical.groups import Group
from graphopt.hierarchical.kernel_derivatives import Stored, by_scales
from graphopt.hierarchical.kernels import Analytic, Kernel, Radial
from graphopt.hierarchical.matrix import HMatrix
from graphopt.hierarchical.packed import Packed
from graphopt.hierarchical.processes.level_products import LevelProducts, values_of
from graphopt.hierarchical.rounding import storage


@dataclass(frozen=True, eq=False)
class Change:
    """The derivative of the matrix by one number, up to a factor: a kernel matrix, too.

    Attributes:
        kernel: of it.
        parameter: which of the tensors has the number.
        entry: where.
        factor: makes it the derivative.
        kind: 0 for the matrix itself, 1 and more for what is stored beside it.
        bound: of the Frobenius norm of the error, without the factor.
    """

    kernel: Analytic
    parameter: int
    entry: int
    factor: float
    kind: int
    bound: float


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
        groups = matrix.packed.groups
        self.changes = self._changes()
        stored = [group.source.changes for group in groups if isinstance(group.source, Stored)]
        kinds = [[values_of(group) for group in groups]]
        if self.changes is not None:
            kinds += [list(own) for own in zip(*stored, strict=True)]
        self._levels = LevelProducts(groups, self.tree, kinds)
        self._kinds = kinds

    @cached_property
    def diagonal_bound(self) -> float:
        """See `Operator`: diagonals are evaluated, and rounded."""
        here = self._points.unsqueeze(1)
        with torch.no_grad():
            return 16 * storage(self.dtype) * float(self.kernel(here, here).abs().sum())

    def _changes(self) -> tuple[Change, ...] | None:
        """By all numbers that there are; None where that is not known in closed form."""
        packed, scales = self.matrix.packed, by_scales(self.kernel)
        if scales is None or not all(isinstance(g.source, Stored) for g in packed.groups):
            return None if self.parameters else ()
        assert isinstance(self.kernel, Radial)
        found = []
        for number, parameter in enumerate(self.parameters):
            entries = parameter.detach().flatten().tolist()
            if parameter is self.kernel.scale:
                for i, (kernel, entry) in enumerate(zip(scales, entries, strict=True)):
                    bound = packed.derivative_bounds[i]
                    found.append(Change(kernel, number, i, 1 / entry, i + 1, bound))
            else:
                own = cast(Analytic, self.kernel)
                found.append(Change(own, number, 0, 1 / entries[0], 0, self.bound))
        return tuple(found)

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
        if level is None:
            return self.matrix.packed.product(values)
        return self._levels(values, level, [0])[0]

    def inner_gradient(
        self, w: Tensor, v: Tensor, level: int | None = None, own: bool = True
    ) -> list[Tensor]:
        """See `Operator`."""
        if self.changes is None:
            return self.matrix.packed.inner_gradient(w, v, level)
        kinds = sorted({change.kind for change in self.changes if own or change.kind})
        if level is None:
            found = [self._packed(kind).product(v) for kind in kinds]
        else:
            found = self._levels(v, level, kinds)
        sums = {kind: (w * image).sum() for kind, image in zip(kinds, found, strict=True)}
        zero = w.new_zeros(())
        return self.gathered([sums.get(change.kind, zero) for change in self.changes])

    def own_gradient(self, number: Tensor) -> list[Tensor]:
        """See `Operator`: the variance."""
        if self.changes is None:
            return [torch.zeros_like(p) for p in self.parameters]
        zero = torch.zeros_like(number)
        return self.gathered([zero if change.kind else number for change in self.changes])

    def changed(self, change: Change, values: Tensor) -> Tensor:
        """A change times [n, k]."""
        return self._packed(change.kind).product(values)

    def norm(self, change: Change) -> float:
        """Of a change as it is stored: the Frobenius norm."""
        return self._packed(change.kind).norm

    def gathered(self, numbers: list[Tensor]) -> list[Tensor]:
        """Numbers for the changes, [] each, as gradients of the parameters."""
        assert self.changes is not None
        total = [torch.zeros_like(p, dtype=torch.float64) for p in self.parameters]
        for change, number in zip(self.changes, numbers, strict=True):
            total[change.parameter].view(-1)[change.entry] += change.factor * number
        return total

    def _packed(self, kind: int) -> Packed:
        packed = self.matrix.packed
        if not kind:
            return packed
        groups: list[Group] = []
        for group, own in zip(packed.groups, self._kinds[kind], strict=True):
            if isinstance(group, Coupled):
                groups.append(replace(group, source=None, cores=own))
            elif isinstance(group, Tiles):
                groups.append(replace(group, source=None, values=own))
        return Packed(groups, packed.rows, packed.columns)

    @torch.no_grad()
    def diagonal(self, level: int) -> Tensor:
        """See `Operator`."""
        blocks, filled = self._diagonal(level)
        return torch.where(filled, blocks(self.kernel, slice(None)), 0.0)

    def diagonal_gradient(self, level: int, weights: Tensor) -> list[Tensor]:
        """See `Operator`."""
        blocks, filled = self._diagonal(level)
        step = max(1, 2**17 // weights[0].numel())
        parts = [slice(start, start + step) for start in range(0, len(weights), step)]
        if self.changes is not None:
            numbers = [weights.new_zeros(()) for _ in self.changes]
            for part in parts:
                own = torch.where(filled[part], weights[part], 0.0)
                for number, change in zip(numbers, self.changes, strict=True):
                    if not change.kind:
                        continue
                    number += (own * blocks(change.kernel, part)).sum()
            return self.gathered(numbers)
        total = [torch.zeros_like(p) for p in self.parameters]
        for part in parts:
            own = torch.where(filled[part], weights[part], 0.0)
            with torch.enable_grad():
                found = torch.autograd.grad(
                    blocks(self.kernel, part), self.parameters, own, allow_unused=True
                )
            for sum_, gradient in zip(total, found, strict=True):
                if gradient is not None:
                    sum_.add_(gradient)
        return total

    def _diagonal(self, level: int) -> tuple[Callable[[Kernel, slice], Tensor], Tensor]:
        """The blocks of a slice of clusters, and where they are filled: [c, m, m]."""
        positions = self.tree.positions[level]
        here = positions < len(self.tree)
        points = self._points[positions.clamp(max=len(self.tree) - 1)]
        filled = here.unsqueeze(2) & here.unsqueeze(1)

        def blocks(kernel: Kernel, part: slice) -> Tensor:
            return kernel(points[part], points[part])

        return blocks, filled
