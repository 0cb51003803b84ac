"""Hierarchically off-diagonal low rank: halves of halves, dense at the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from graphopt.structured.form import Form, Product
from graphopt.structured.truncate import split


@dataclass(frozen=True)
class Hodlr(Form):
    """On level l there are 2^l clusters; the two of one parent see each other by a low rank.

    Three batched products, whatever the number of levels: each leaf takes its share in the blocks
    of all levels at once. In between, what the leaves of a cluster have seen is summed level by
    level, in tensors that are as small as the ranks. Factors: the leaves [2^levels, m, n], left
    [2^levels, m, levels k] by rows and right [2^levels, levels k, n] by columns, the levels side by
    side from the largest blocks to the smallest.

    Attributes:
        levels: how often it is halved.
        k: rank of the blocks off the diagonal.
    """

    name: ClassVar[str] = "hodlr"

    levels: int
    k: int

    @classmethod
    def of_shapes(cls, rows: int, cols: int, shapes: Sequence[tuple[int, ...]]) -> Form | None:
        """See `Form`."""
        if len(shapes) != 3 or any(len(shape) != 3 for shape in shapes):
            return None
        levels = shapes[0][0].bit_length() - 1
        return cls(rows, cols, levels, shapes[1][2] // levels) if levels else None

    @property
    def leaves(self) -> int:
        """How many blocks there are on the diagonal."""
        return 1 << self.levels

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """See `Form`."""
        count, inner = self.leaves, self.levels * self.k
        m, n = self.rows // count, self.cols // count
        return (count, m, n), (count, m, inner), (count, inner, n)

    @property
    def rank(self) -> int:
        """See `Form`."""
        return self.k

    def products(self, columns: int) -> list[Product]:
        """See `Form`."""
        (count, m, n), (_, _, inner), _ = self.shapes
        return [
            Product(count, m, n, columns),
            Product(count, inner, n, columns),
            Product(count, m, inner, columns),
        ]

    def block(self, weight: Tensor, level: int, row: int, col: int) -> Tensor:
        """What row cluster `row` of a level sees of column cluster `col`."""
        m, n = self.rows >> level, self.cols >> level
        return weight[row * m : (row + 1) * m, col * n : (col + 1) * n]

    def factors(self, weight: Tensor) -> tuple[Tensor, ...]:
        """See `Form`."""
        wide = weight.double()
        leaves, left, right = map(wide.new_zeros, self.shapes)
        _, m, n = self.shapes[0]
        for leaf in range(self.leaves):
            leaves[leaf] = self.block(wide, self.levels, leaf, leaf)
        for level in range(1, self.levels + 1):
            own = slice((level - 1) * self.k, level * self.k)
            by_rows = left[..., own].view(1 << level, -1, m, self.k)
            by_columns = right[:, own].view(1 << level, -1, self.k, n)
            for row in range(1 << level):
                u, v = split(self.block(wide, level, row, row ^ 1), self.k)
                by_rows[row] = u.view_as(by_rows[row])
                by_columns[row ^ 1] = v.reshape(self.k, -1, n).transpose(0, 1)
        return tuple(f.to(weight.dtype) for f in (leaves, left, right))

    def dense(self, factors: Sequence[Tensor]) -> Tensor:
        """See `Form`."""
        leaves, left, right = factors
        blocks: list[Tensor] = list(leaves)
        for level in range(self.levels, 0, -1):
            own, count = slice((level - 1) * self.k, level * self.k), 1 << level
            by_rows = left[..., own].reshape(count, -1, self.k)
            by_columns = right[:, own].reshape(count, -1, self.k, right.shape[2])
            far = by_rows @ _siblings(by_columns.transpose(1, 2).flatten(2))
            blocks = [
                torch.cat(
                    [
                        torch.cat([blocks[row], far[row]], 1),
                        torch.cat([far[row + 1], blocks[row + 1]], 1),
                    ]
                )
                for row in range(0, count, 2)
            ]
        return blocks[0]

    def multiply(self, factors: Sequence[Tensor], x: Tensor) -> Tensor:
        """See `Form`."""
        leaves, left, right = factors
        parts = x.view(self.leaves, -1, x.shape[1])
        seen = torch.split(torch.bmm(right, parts), self.k, 1)
        inner = [_of_sibling(part, level) for level, part in enumerate(seen, start=1)]
        result = torch.baddbmm(torch.bmm(leaves, parts), left, torch.cat(inner, 1))
        return result.view(self.rows, -1)

    def transposed(self, factors: Sequence[Tensor]) -> tuple[Form, tuple[Tensor, ...]]:
        """Rows and columns change places; clusters stay."""
        leaves, left, right = factors
        return Hodlr(self.cols, self.rows, self.levels, self.k), (leaves.mT, right.mT, left.mT)

    def __str__(self) -> str:
        return f"{self.name}, {self.levels} levels, rank {self.k}"


def _siblings(values: Tensor) -> Tensor:
    """[2^l, ...] with the two of each parent exchanged."""
    pairs = values.reshape(-1, 2, *values.shape[1:])
    return pairs.flip(1).flatten(0, 1)


def _of_sibling(seen: Tensor, level: int) -> Tensor:
    """For each leaf the sum over the leaves in the sibling of its cluster, [leaves, k, columns]."""
    clusters = seen.reshape(1 << level, -1, *seen.shape[1:])
    sums = _siblings(clusters.sum(1)).unsqueeze(1)
    return sums.expand_as(clusters).flatten(0, 1)
