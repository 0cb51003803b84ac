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

    Two batched products per level, and one for the leaves. Factors: the leaves
    [2^levels, rows/2^levels, cols/2^levels], then per level left [2^l, rows/2^l, k_l] by row
    clusters and right [2^l, k_l, cols/2^l] by column clusters.

    Attributes:
        ranks: k_l of the levels 1, 2, …
    """

    name: ClassVar[str] = "hodlr"

    ranks: tuple[int, ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """See `Form`."""
        return (self.rows, self.cols, *self.ranks)

    @classmethod
    def of_sizes(cls, sizes: Sequence[int]) -> Form:
        """See `Form`."""
        rows, cols, *ranks = sizes
        return cls(rows, cols, tuple(ranks))

    @classmethod
    def of_shapes(cls, rows: int, cols: int, shapes: Sequence[tuple[int, ...]]) -> Form | None:
        """See `Form`."""
        if len(shapes) < 3 or len(shapes) % 2 == 0 or any(len(shape) != 3 for shape in shapes):
            return None
        return cls(rows, cols, tuple(shape[2] for shape in shapes[1::2]))

    @property
    def levels(self) -> int:
        """How often it is halved."""
        return len(self.ranks)

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """See `Form`."""
        leaves = 1 << self.levels
        found: list[tuple[int, ...]] = [(leaves, self.rows // leaves, self.cols // leaves)]
        for level, k in enumerate(self.ranks, start=1):
            count = 1 << level
            found += [(count, self.rows // count, k), (count, k, self.cols // count)]
        return tuple(found)

    @property
    def rank(self) -> int:
        """See `Form`."""
        return max(self.ranks)

    def products(self, columns: int) -> list[Product]:
        """See `Form`."""
        leaves = 1 << self.levels
        found = [Product(leaves, self.rows // leaves, self.cols // leaves, columns)]
        for level, k in enumerate(self.ranks, start=1):
            count = 1 << level
            found.append(Product(count, k, self.cols // count, columns))
            found.append(Product(count, self.rows // count, k, columns))
        return found

    def block(self, weight: Tensor, level: int, row: int, col: int) -> Tensor:
        """What row cluster `row` of a level sees of column cluster `col`."""
        m, n = self.rows >> level, self.cols >> level
        return weight[row * m : (row + 1) * m, col * n : (col + 1) * n]

    def factors(self, weight: Tensor) -> tuple[Tensor, ...]:
        """See `Form`."""
        wide = weight.double()
        leaves, *rest = map(wide.new_zeros, self.shapes)
        for leaf in range(1 << self.levels):
            leaves[leaf] = self.block(wide, self.levels, leaf, leaf)
        for level, k in enumerate(self.ranks, start=1):
            left, right = rest[2 * level - 2 : 2 * level]
            for row in range(1 << level):
                left[row], right[row ^ 1] = split(self.block(wide, level, row, row ^ 1), k)
        return tuple(f.to(weight.dtype) for f in (leaves, *rest))

    def dense(self, factors: Sequence[Tensor]) -> Tensor:
        """See `Form`."""
        leaves, *rest = factors
        blocks: list[Tensor] = list(leaves)
        for level in range(self.levels, 0, -1):
            left, right = rest[2 * level - 2 : 2 * level]
            far = left @ _siblings(right)
            blocks = [
                torch.cat(
                    [
                        torch.cat([blocks[row], far[row]], 1),
                        torch.cat([far[row + 1], blocks[row + 1]], 1),
                    ]
                )
                for row in range(0, 1 << level, 2)
            ]
        return blocks[0]

    def multiply(self, factors: Sequence[Tensor], x: Tensor) -> Tensor:
        """See `Form`."""
        leaves, *rest = factors
        columns = x.shape[1]
        result = torch.bmm(leaves, x.view(leaves.shape[0], -1, columns))
        for level in range(1, self.levels + 1):
            left, right = rest[2 * level - 2 : 2 * level]
            count = 1 << level
            inner = _siblings(torch.bmm(right, x.view(count, -1, columns)))
            result = torch.baddbmm(result.view(count, -1, columns), left, inner)
        return result.view(self.rows, columns)

    def transposed(self, factors: Sequence[Tensor]) -> tuple[Form, tuple[Tensor, ...]]:
        """Rows and columns change places; clusters stay."""
        leaves, *rest = factors
        found = [leaves.mT]
        for level in range(self.levels):
            left, right = rest[2 * level : 2 * level + 2]
            found += [right.mT, left.mT]
        return Hodlr(self.cols, self.rows, self.ranks), tuple(found)

    def __str__(self) -> str:
        return f"{self.name}, {self.levels} levels, ranks {','.join(map(str, self.ranks))}"


def _siblings(values: Tensor) -> Tensor:
    """[2^l, ...] with the two of each parent exchanged."""
    pairs = values.reshape(-1, 2, *values.shape[1:])
    return pairs.flip(1).flatten(0, 1)
