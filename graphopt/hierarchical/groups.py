"""What groups of blocks of one shape and level have in common, and the operands of their products.

A group owns the memory of its blocks. Clusters of a level differ in size by one at most, so all
have the shape of the largest, and what the others lack is zero.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from graphopt.hierarchical.admissibility import Pairs
from graphopt.hierarchical.blocks import Dense, LowRank
from graphopt.hierarchical.clusters import ClusterTree

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
        found = torch.autograd.grad(values, parameters, weights.to(values), allow_unused=True)
    for sum_, gradient in zip(total, found, strict=True):
        if gradient is not None:
            sum_.add_(gradient)


class Gathered:
    """Rows of an operand by cluster, made once for each level."""

    def __init__(self, tree: ClusterTree, values: Tensor) -> None:
        self._padded = torch.cat([values, values.new_zeros(1, values.shape[1])])
        self._positions = tree.on(values.device).positions
        self._levels: dict[int, Tensor] = {}

    def __getitem__(self, level: int) -> Tensor:
        """[2**level, m, q]."""
        if level not in self._levels:
            self._levels[level] = self._padded[self._positions[level]]
        return self._levels[level]


class Collected:
    """Sums of results by cluster, which become rows in the end."""

    def __init__(self, tree: ClusterTree, like: Tensor) -> None:
        self._length = len(tree)
        self._positions = tree.on(like.device).positions
        self._like = like
        self._levels: dict[int, Tensor] = {}

    def __getitem__(self, level: int) -> Tensor:
        """[2**level, m, q] to add to, in place."""
        if level not in self._levels:
            shape = (*self._positions[level].shape, self._like.shape[1])
            self._levels[level] = self._like.new_zeros(shape)
        return self._levels[level]

    def rows(self) -> Tensor:
        """[n, q] the sum over levels."""
        total = self._like.new_zeros(self._length + 1, self._like.shape[1])
        for level, values in self._levels.items():
            total = total.index_add(0, self._positions[level].flatten(), values.flatten(0, 1))
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
    def places(self) -> tuple[Tensor, Tensor]:
        """[b] and [b] the clusters of rows and of columns, on the device of the blocks."""
        device = self.tensors[0].device
        return self.pairs.rows.to(device), self.pairs.columns.to(device)

    def to(self, device: torch.device) -> Self:
        """The same blocks on a device; what was one tensor stays one."""
        moved: dict[int, Tensor] = {}
        for own in fields(self):
            value = getattr(self, own.name)
            if isinstance(value, Tensor) and id(value) not in moved:
                moved[id(value)] = value.to(device)
        found = {
            own.name: moved[id(getattr(self, own.name))]
            for own in fields(self)
            if id(getattr(self, own.name)) in moved
        }
        return replace(self, **found)

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
