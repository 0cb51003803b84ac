"""Which forms come near enough to a weight with fewer numbers than it has."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from graphopt.structured import Form
from graphopt.structured.blr import Blr
from graphopt.structured.flat import Flat
from graphopt.structured.hodlr import Hodlr
from graphopt.structured.toeplitz import Toeplitz
from graphopt.structured.truncate import least_rank

TILES = (4, 8, 16)
# Blocks below this size are never worth a product of their own.
LEAST_BLOCK = 16


def forms_within(weight: Tensor, tolerance: float, most: float) -> Iterator[Form]:
    """Forms whose nearest matrix is within a relative error, of at most so many numbers.

    An error allowed for the whole in the Frobenius norm is divided evenly by its squares over the
    blocks in factors, which are disjoint: so if each of b blocks keeps allowed / sqrt(b), the whole
    keeps it.

    Args:
        weight: [rows, cols].
        tolerance: largest error relative to the Frobenius norm of the weight.
        most: numbers that a form may have.
    """
    wide = weight.double()
    allowed = tolerance * float(torch.linalg.norm(wide))
    yield from _flat(wide, allowed, most)
    yield from _toeplitz(wide, allowed, most)
    yield from _tiles(wide, allowed, most)
    yield from _halves(wide, allowed, most)


def _flat(weight: Tensor, allowed: float, most: float) -> Iterator[Form]:
    rows, cols = weight.shape
    limit = int(min(rows, cols, most // (rows + cols)))
    rank = least_rank(weight, allowed, limit) if limit else None
    if rank is not None:
        yield Flat(rows, cols, max(rank, 1))


def _toeplitz(weight: Tensor, allowed: float, most: float) -> Iterator[Form]:
    form = Toeplitz(*weight.shape)
    if form.numbers <= most:
        near = form.dense(form.factors(weight))
        if float(torch.linalg.norm(near - weight)) <= allowed:
            yield form


def _tiles(weight: Tensor, allowed: float, most: float) -> Iterator[Form]:
    rows, cols = weight.shape
    for tiles in TILES:
        if rows % tiles or cols % tiles or min(rows, cols) // tiles < LEAST_BLOCK:
            continue
        one = Blr(rows, cols, tiles, 1)
        fixed = math.prod(one.shapes[0])
        limit = int(min(one.m, one.n, (most - fixed) // (one.numbers - fixed)))
        each = allowed / math.sqrt(tiles * (tiles - 1))
        pairs = ((i, j) for i in range(tiles) for j in range(tiles) if i != j)
        rank = _largest((one.tile(weight, i, j) for i, j in pairs), each, limit)
        if rank is not None:
            yield Blr(rows, cols, tiles, rank)


def _halves(weight: Tensor, allowed: float, most: float) -> Iterator[Form]:
    """All depths; the ranks are such that the deepest keeps the bound, whose blocks are most."""
    rows, cols = weight.shape
    deepest = 0
    while not (rows | cols) & ((2 << deepest) - 1):
        if min(rows, cols) >> (deepest + 1) < LEAST_BLOCK:
            break
        deepest += 1
    each = allowed / math.sqrt(max((2 << deepest) - 2, 1))
    largest = 1
    for level in range(1, deepest + 1):
        shape = Hodlr(rows, cols, level, 1)
        limit = min(rows, cols) >> (level + 1)
        blocks = (shape.block(weight, level, row, row ^ 1) for row in range(1 << level))
        rank = _largest(blocks, each, limit)
        if rank is None:
            return
        largest = max(largest, rank)
        form = Hodlr(rows, cols, level, largest)
        if form.numbers <= most:
            yield form


def _largest(blocks: Iterator[Tensor], allowed: float, limit: int) -> int | None:
    """The rank that all blocks need; ``None`` as soon as one needs more than `limit`."""
    largest = 1
    for block in blocks:
        rank = least_rank(block, allowed, limit) if limit > 0 else None
        if rank is None:
            return None
        largest = max(largest, rank)
    return largest
