"""What a block of a hierarchical matrix may be: dense, of low rank, or a grid of blocks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Dense:
    """All entries.

    Attributes:
        values: [m, n].
    """

    values: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.values.shape[0], self.values.shape[1]


@dataclass(frozen=True, eq=False)
class LowRank:
    """``left @ core @ right.T``; without a core ``left @ right.T``.

    Bases may be shared: many blocks of one matrix then refer to one tensor.

    Attributes:
        left: [m, k].
        right: [n, l].
        core: [k, l], or None where k is l and the product needs none.
    """

    left: Tensor
    right: Tensor
    core: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.left.shape[0], self.right.shape[0]

    @property
    def rank(self) -> int:
        """An upper bound of the rank."""
        return min(self.left.shape[1], self.right.shape[1])


@dataclass(frozen=True, eq=False)
class Grid:
    """Blocks beside and below each other, which cover the children of two clusters.

    Attributes:
        blocks: rows of blocks.
    """

    blocks: tuple[tuple[Block, ...], ...]

    @cached_property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.row_spans[-1][1], self.column_spans[-1][1]

    @cached_property
    def row_spans(self) -> list[tuple[int, int]]:
        """Where each row of blocks begins and ends."""
        return list(pairwise(accumulate((line[0].shape[0] for line in self.blocks), initial=0)))

    @cached_property
    def column_spans(self) -> list[tuple[int, int]]:
        """Where each column of blocks begins and ends."""
        return list(pairwise(accumulate((block.shape[1] for block in self.blocks[0]), initial=0)))


Block = Dense | LowRank | Grid


@dataclass(frozen=True)
class Placed:
    """A block that is no grid, and where it begins."""

    row: int
    column: int
    block: Dense | LowRank


def placed(block: Block, row: int = 0, column: int = 0) -> Iterator[Placed]:
    """All blocks of a tree of blocks that are no grids."""
    if not isinstance(block, Grid):
        yield Placed(row, column, block)
        return
    for line in block.blocks:
        at = column
        for inner in line:
            yield from placed(inner, row, at)
            at += inner.shape[1]
        row += line[0].shape[0]


def dense(block: Block, dtype: torch.dtype | None = None) -> Tensor:
    """[m, n] with all entries; for small blocks and for tests.

    Args:
        block: any.
        dtype: in which it is computed; None for that of the block.
    """
    if isinstance(block, Dense):
        return block.values.to(dtype or block.values.dtype)
    if isinstance(block, LowRank):
        dtype = dtype or block.left.dtype
        left = block.left.to(dtype)
        if block.core is not None:
            left = left @ block.core.to(dtype)
        return left @ block.right.to(dtype).T
    return torch.cat([torch.cat([dense(b, dtype) for b in line], 1) for line in block.blocks])


def transposed(block: Block) -> Block:
    """The transpose, in the same memory."""
    if isinstance(block, Dense):
        return Dense(block.values.T)
    if isinstance(block, LowRank):
        return LowRank(block.right, block.left, None if block.core is None else block.core.T)
    return Grid(
        tuple(tuple(transposed(b) for b in column) for column in zip(*block.blocks, strict=True))
    )
