"""Parts of blocks, in the same memory, and products of blocks with tall matrices."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from graphopt.hierarchical.arithmetic.magnitudes import magnitude
from graphopt.hierarchical.blocks import Block, Dense, Grid, LowRank
from graphopt.hierarchical.rounding import gamma

LEAF = 64  # the size down to which a low-rank block on the diagonal is halved
Span = tuple[int, int]


def common(first: list[Span], second: list[Span]) -> list[Span]:
    """Spans that both sets of spans are unions of."""
    cuts = sorted({cut for span in (*first, *second) for cut in span})
    return list(pairwise(cuts))


def part(block: Block, rows: Span, columns: Span) -> Block:
    """A rectangle of `block`, which shares its memory."""
    m, n = block.shape
    if rows == (0, m) and columns == (0, n):
        return block
    if isinstance(block, Dense):
        return Dense(block.values[slice(*rows), slice(*columns)])
    if isinstance(block, LowRank):
        return LowRank(block.left[slice(*rows)], block.right[slice(*columns)], block.core)
    below = [(i, s) for i, s in enumerate(block.row_spans) if s[0] < rows[1] and rows[0] < s[1]]
    beside = [
        (j, s) for j, s in enumerate(block.column_spans) if s[0] < columns[1] and columns[0] < s[1]
    ]
    lines = tuple(
        tuple(part(block.blocks[i][j], _inside(rows, r), _inside(columns, c)) for j, c in beside)
        for i, r in below
    )
    return lines[0][0] if len(lines) == len(lines[0]) == 1 else Grid(lines)


def recut(block: Block, rows: list[Span], columns: list[Span]) -> Grid:
    """The same entries as a grid that is cut there."""
    if isinstance(block, Grid) and block.row_spans == rows and block.column_spans == columns:
        return block
    return Grid(tuple(tuple(part(block, r, c) for c in columns) for r in rows))


def halved(block: LowRank) -> Grid:
    """A square low-rank block as four."""
    middle = (block.shape[0] + 1) // 2
    spans = [(0, middle), (middle, block.shape[0])]
    return recut(block, spans, spans)


def factors(block: LowRank) -> tuple[Tensor, Tensor]:
    """``(left, right)`` of which the block is ``left @ right.T``."""
    return (block.left if block.core is None else block.left @ block.core), block.right


def any_tensor(block: Block) -> Tensor:
    """One of its tensors."""
    while isinstance(block, Grid):
        block = block.blocks[0][0]
    return block.values if isinstance(block, Dense) else block.left


def apply(block: Block, x: Tensor, transpose: bool = False) -> Tensor:
    """``block @ x``, or ``block.T @ x``, in the dtype of `x`; x: [n, c].

    Autograd passes through it into the tensors of the block.
    """
    if isinstance(block, Dense):
        values = block.values.to(x.dtype)
        return (values.T if transpose else values) @ x
    if isinstance(block, LowRank):
        left, right, core = block.left, block.right, block.core
        if transpose:
            left, right, core = right, left, None if core is None else core.T
        inner = right.to(x.dtype).T @ x
        return left.to(x.dtype) @ (inner if core is None else core.to(x.dtype) @ inner)
    lines = zip(*block.blocks, strict=True) if transpose else block.blocks
    spans = block.row_spans if transpose else block.column_spans
    found = []
    for line in lines:
        total = None
        for inner_block, span in zip(line, spans, strict=True):
            piece = apply(inner_block, x[slice(*span)], transpose)
            total = piece if total is None else total + piece
        assert total is not None
        found.append(total)
    return torch.cat(found)


def diagonal(block: Block) -> Tensor:
    """[n] of a square block."""
    if isinstance(block, Dense):
        return block.values.diagonal()
    if isinstance(block, LowRank):
        left, right = factors(block)
        return (left * right).sum(1)
    spans = common(block.row_spans, block.column_spans)
    if len(spans) == 1:
        return diagonal(block.blocks[0][0])
    return torch.cat([diagonal(part(block, span, span)) for span in spans])


def frobenius(block: Block) -> float:
    """An upper bound of the Frobenius norm, rounding included."""
    if isinstance(block, Dense):
        return magnitude(block) * (1 + 1e-12)
    if isinstance(block, LowRank):
        left, right = (side.double() for side in factors(block))
        square = float(((left.T @ left) * (right.T @ right)).sum())
        rest = 4 * gamma(sum(block.shape) + block.rank, torch.float64) * magnitude(block) ** 2
        if block.core is not None:
            rest += 4 * gamma(block.core.shape[0], block.left.dtype) * magnitude(block) ** 2
        return math.sqrt(max(square, 0.0) + rest)
    return math.hypot(*(frobenius(b) for line in block.blocks for b in line))


def _inside(span: Span, of: Span) -> Span:
    """The part of `span` in `of`, counted from its begin."""
    return max(span[0], of[0]) - of[0], min(span[1], of[1]) - of[0]
