"""The kinds of groups: dense blocks, and those of low rank with shared bases or with their own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from graphopt.hierarchical.admissibility import Pairs
from graphopt.hierarchical.blocks import Dense, LowRank
from graphopt.hierarchical.groups import Collected, Gathered, Group, Source
from graphopt.hierarchical.rounding import gamma, norms


@dataclass(frozen=True, eq=False)
class Tiles(Group):
    """Dense blocks.

    Attributes:
        values: [b, m, n].
    """

    values: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """See `Group`."""
        return (self.values,)

    def add(self, part: slice, given: Gathered, out: Collected) -> None:
        """See `Group`."""
        (every, beside), total = self.places, out[self.pairs.row_level]
        x = given[self.pairs.column_level]
        for own in self.chunks(part, max(self.values.shape[1:]) * x.shape[2]):
            rows, columns, values = every[own], beside[own], self.values[own]
            total.index_add_(0, rows, values @ x[columns])
            if self.mirrored:
                total.index_add_(0, columns, values.mT @ x[rows])

    def gradients(self, part: slice, w: Gathered, v: Gathered) -> Iterator[tuple[slice, Tensor]]:
        """See `Group`."""
        own, other = w[self.pairs.row_level], v[self.pairs.column_level]
        yield from _outer(self, part, self.values, own, other)

    def transposed(self) -> Tiles:
        """See `Group`."""
        if self.mirrored:
            return self
        return Tiles(
            _swapped(self.pairs), self.values.mT, source=_turned(self.source), work=self.work
        )

    def block(self, number: int, rows: int, columns: int) -> Dense:
        """See `Group`."""
        return Dense(self.values[number, :rows, :columns])

    @cached_property
    def squares(self) -> Tensor:
        """See `Group`."""
        return norms(self.values).square()

    def rounding(self, dtype: torch.dtype) -> float:
        """See `Group`."""
        return gamma(self.values.shape[2] + self.crowd, dtype) * self.norm


@dataclass(frozen=True, eq=False)
class Coupled(Group):
    """Blocks of low rank whose bases belong to the clusters: ``left[t] @ core @ right[s].T``.

    Attributes:
        cores: [b, k, l].
        left: [2**row_level, m, k] for each cluster of rows.
        right: [2**column_level, n, l] for each cluster of columns.
        stretch: bounds of the spectral norms of the bases, left and right.
    """

    cores: Tensor
    left: Tensor
    right: Tensor
    stretch: tuple[float, float]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """See `Group`."""
        return self.cores, self.left, self.right

    def add(self, part: slice, given: Gathered, out: Collected) -> None:
        """See `Group`."""
        every, beside = self.places
        z = self.right.mT @ given[self.pairs.column_level]
        total = z.new_zeros(self.left.shape[0], self.left.shape[2], z.shape[2])
        for own in self.chunks(part, max(self.cores.shape[1:]) * z.shape[2]):
            rows, columns, cores = every[own], beside[own], self.cores[own]
            total.index_add_(0, rows, cores @ z[columns])
            if self.mirrored:
                total.index_add_(0, columns, cores.mT @ z[rows])
        out[self.pairs.row_level].add_(self.left @ total)

    def gradients(self, part: slice, w: Gathered, v: Gathered) -> Iterator[tuple[slice, Tensor]]:
        """See `Group`."""
        own = self.left.mT @ w[self.pairs.row_level]
        other = self.right.mT @ v[self.pairs.column_level]
        if self.mirrored:
            # The basis is that of both sides: so the operands are, and nothing is left to mirror.
            own, other = torch.cat([own, other], 2), torch.cat([other, own], 2)
        once = replace(self, mirrored=False)
        yield from _outer(once, part, self.cores, own, other)

    def transposed(self) -> Coupled:
        """See `Group`."""
        if self.mirrored:
            return self
        stretch = self.stretch[1], self.stretch[0]
        return Coupled(
            _swapped(self.pairs),
            self.cores.mT,
            self.right,
            self.left,
            stretch,
            source=_turned(self.source),
            work=self.work,
        )

    def block(self, number: int, rows: int, columns: int) -> LowRank:
        """See `Group`."""
        left = self.left[int(self.pairs.rows[number]), :rows]
        right = self.right[int(self.pairs.columns[number]), :columns]
        return LowRank(left, right, self.cores[number])

    @cached_property
    def squares(self) -> Tensor:
        """See `Group`."""
        return norms(self.cores).square()

    def rounding(self, dtype: torch.dtype) -> float:
        """See `Group`."""
        own, other = (float(norms(basis).max()) for basis in (self.left, self.right))
        exact = self.stretch[0] * self.stretch[1]
        first = self.stretch[1] + gamma(self.right.shape[1], dtype) * other
        second = 1 + gamma(self.cores.shape[2] + self.crowd, dtype)
        third = self.stretch[0] + gamma(self.left.shape[2] + 1, dtype) * own
        return (first * second * third - exact) * self.norm


@dataclass(frozen=True, eq=False)
class Factored(Group):
    """Blocks of low rank with bases of their own: ``left @ right.T``.

    Attributes:
        left: [b, m, k].
        right: [b, n, k].
    """

    left: Tensor
    right: Tensor

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """See `Group`."""
        return self.left, self.right

    def add(self, part: slice, given: Gathered, out: Collected) -> None:
        """See `Group`."""
        (every, beside), total = self.places, out[self.pairs.row_level]
        x = given[self.pairs.column_level]
        for own in self.chunks(part, max(self.left.shape[1], self.right.shape[1]) * x.shape[2]):
            rows, columns = every[own], beside[own]
            left, right = self.left[own], self.right[own]
            total.index_add_(0, rows, left @ (right.mT @ x[columns]))
            if self.mirrored:
                total.index_add_(0, columns, right @ (left.mT @ x[rows]))

    def gradients(self, part: slice, w: Gathered, v: Gathered) -> Iterator[tuple[slice, Tensor]]:
        """Factors have no source: they are differentiated by autograd itself."""
        return iter(())

    def transposed(self) -> Factored:
        """See `Group`."""
        return self if self.mirrored else Factored(_swapped(self.pairs), self.right, self.left)

    def block(self, number: int, rows: int, columns: int) -> LowRank:
        """See `Group`."""
        return LowRank(self.left[number, :rows], self.right[number, :columns])

    @cached_property
    def squares(self) -> Tensor:
        """See `Group`."""
        left, right = self.left.detach().double(), self.right.detach().double()
        return ((left.mT @ left) * (right.mT @ right)).sum((1, 2)).clamp(min=0)

    def rounding(self, dtype: torch.dtype) -> float:
        """See `Group`."""
        sizes = norms(self.left) * norms(self.right)
        size = float((sizes.square().sum() * (1 + self.mirrored)).sqrt())
        inner = 1 + gamma(max(self.left.shape[1], self.right.shape[1]), dtype)
        return (inner * (1 + gamma(self.left.shape[2] + self.crowd, dtype)) - 1) * size


def _outer(
    group: Group, part: slice, values: Tensor, w: Tensor, v: Tensor
) -> Iterator[tuple[slice, Tensor]]:
    """For each block, ``w[row] @ v[column].T``, and that of its transpose."""
    every, beside = group.places
    size = values.shape[1] * values.shape[2] + w.shape[1] * w.shape[2]
    # Derivatives of a kernel take several passes over its values, which should be in a cache.
    for own in group.chunks(part, max(size, 8 * group.work)):
        rows, columns = every[own], beside[own]
        found = w[rows] @ v[columns].mT
        if group.mirrored:
            found = found + v[rows] @ w[columns].mT
        yield own, found


def _turned(source: Source | None) -> Source | None:
    return None if source is None else lambda part: source(part).mT


def _swapped(pairs: Pairs) -> Pairs:
    return Pairs(pairs.column_level, pairs.row_level, pairs.columns, pairs.rows)
