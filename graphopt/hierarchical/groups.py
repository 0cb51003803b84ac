"""Blocks of one shape on one level, multiplied together in batched products.

A group owns the memory of its blocks. Clusters of a level differ in size by one at most, so all
have the shape of the largest, and what the others lack is zero.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from graphopt.hierarchical.admissibility import Pairs
from graphopt.hierarchical.blocks import Dense, LowRank
from graphopt.hierarchical.clusters import ClusterTree
from graphopt.hierarchical.rounding import gamma, norms

# Entries that a gathered operand of a batched product may have.
_CHUNK = 2**20

Source = Callable[[slice], Tensor]


def add_derivatives(
    total: Sequence[Tensor],
    parameters: Sequence[Tensor],
    source: Source,
    own: slice,
    weights: Tensor,
) -> None:
    """Add to `total` the derivatives of ``sum(weights * source(own))`` by the parameters."""
    with torch.enable_grad():
        values = source(own)
        found = torch.autograd.grad(values, parameters, weights.to(values.dtype), allow_unused=True)
    for sum_, gradient in zip(total, found, strict=True):
        if gradient is not None:
            sum_.add_(gradient)


class Gathered:
    """Rows of an operand by cluster, made once for each level."""

    def __init__(self, tree: ClusterTree, values: Tensor) -> None:
        self._tree = tree
        self._padded = torch.cat([values, values.new_zeros(1, values.shape[1])])
        self._levels: dict[int, Tensor] = {}

    def __getitem__(self, level: int) -> Tensor:
        """[2**level, m, q]."""
        if level not in self._levels:
            self._levels[level] = self._padded[self._tree.positions[level]]
        return self._levels[level]


class Collected:
    """Sums of results by cluster, which become rows in the end."""

    def __init__(self, tree: ClusterTree, like: Tensor) -> None:
        self._tree = tree
        self._like = like
        self._levels: dict[int, Tensor] = {}

    def __getitem__(self, level: int) -> Tensor:
        """[2**level, m, q] to add to, in place."""
        if level not in self._levels:
            shape = (*self._tree.positions[level].shape, self._like.shape[1])
            self._levels[level] = self._like.new_zeros(shape)
        return self._levels[level]

    def rows(self) -> Tensor:
        """[n, q] the sum over levels."""
        total = self._like.new_zeros(len(self._tree) + 1, self._like.shape[1])
        for level, values in self._levels.items():
            total = total.index_add(0, self._tree.positions[level].flatten(), values.flatten(0, 1))
        return total[:-1]


@dataclass(frozen=True, eq=False)
class Group(abc.ABC):
    """Blocks of one kind and level.

    Attributes:
        pairs: where they are.
        mirrored: the transposes of all blocks, across the diagonal, belong to the matrix too.
        source: computes values of a slice of blocks anew, as functions of hyperparameters.
        work: how many values of a kernel it computes for each block.
    """

    pairs: Pairs
    mirrored: bool = field(default=False, kw_only=True)
    source: Source | None = field(default=None, kw_only=True)
    work: int = field(default=0, kw_only=True)

    @property
    @abc.abstractmethod
    def tensors(self) -> tuple[Tensor, ...]:
        """All memory."""

    @abc.abstractmethod
    def add(self, part: slice, given: Gathered, out: Collected) -> None:
        """Add the products of a slice of blocks with the rows of `given`."""

    @abc.abstractmethod
    def gradients(self, part: slice, w: Gathered, v: Gathered) -> Iterator[tuple[slice, Tensor]]:
        """Slices of blocks, and the derivatives of ``sum(w * (blocks @ v))`` by their values."""

    @abc.abstractmethod
    def transposed(self) -> Group:
        """In the same memory."""

    @abc.abstractmethod
    def block(self, number: int, rows: int, columns: int) -> Dense | LowRank:
        """A view of one block of so many rows and columns."""

    @cached_property
    @abc.abstractmethod
    def squares(self) -> Tensor:
        """[b] the squared Frobenius norms, float64."""

    @abc.abstractmethod
    def rounding(self, dtype: torch.dtype) -> float:
        """Of a product with a vector of norm 1."""

    @cached_property
    def crowd(self) -> int:
        """The most blocks that one cluster of rows has."""
        counts = self.pairs.rows.bincount()
        if self.mirrored:
            counts = torch.cat([self.pairs.rows, self.pairs.columns]).bincount()
        return int(counts.max())

    @property
    def norm(self) -> float:
        """The Frobenius norm of all of them."""
        return float((self.squares.sum() * (1 + self.mirrored)).sqrt())

    def chunks(self, part: slice, size: int) -> Iterator[slice]:
        """Slices of blocks that have about `size` entries each."""
        step = max(1, _CHUNK // max(size, 1))
        for start in range(part.start, part.stop, step):
            yield slice(start, min(start + step, part.stop))


def _turned(source: Source | None) -> Source | None:
    return None if source is None else lambda part: source(part).mT


def _swapped(pairs: Pairs) -> Pairs:
    return Pairs(pairs.column_level, pairs.row_level, pairs.columns, pairs.rows)


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
        pairs, total = self.pairs, out[self.pairs.row_level]
        x = given[pairs.column_level]
        for own in self.chunks(part, max(self.values.shape[1:]) * x.shape[2]):
            rows, columns, values = pairs.rows[own], pairs.columns[own], self.values[own]
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
        pairs = self.pairs
        z = self.right.mT @ given[pairs.column_level]
        total = z.new_zeros(self.left.shape[0], self.left.shape[2], z.shape[2])
        for own in self.chunks(part, max(self.cores.shape[1:]) * z.shape[2]):
            rows, columns, cores = pairs.rows[own], pairs.columns[own], self.cores[own]
            total.index_add_(0, rows, cores @ z[columns])
            if self.mirrored:
                total.index_add_(0, columns, cores.mT @ z[rows])
        out[pairs.row_level].add_(self.left @ total)

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
        pairs, total = self.pairs, out[self.pairs.row_level]
        x = given[pairs.column_level]
        for own in self.chunks(part, max(self.left.shape[1], self.right.shape[1]) * x.shape[2]):
            rows, columns = pairs.rows[own], pairs.columns[own]
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
    pairs = group.pairs
    size = values.shape[1] * values.shape[2] + w.shape[1] * w.shape[2]
    # Derivatives of a kernel take several passes over its values, which should be in a cache.
    for own in group.chunks(part, max(size, 8 * group.work)):
        rows, columns = pairs.rows[own], pairs.columns[own]
        found = w[rows] @ v[columns].mT
        if group.mirrored:
            found = found + v[rows] @ w[columns].mT
        yield own, found
