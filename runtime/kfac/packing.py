"""Symmetric matrices as their lower triangles, row by row.

Entry (i, j), i >= j, of a matrix is at place i (i + 1) / 2 + j: statistics travel and are kept as
n (n + 1) / 2 numbers instead of n².
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from graphopt.errors import ArgumentError
from graphopt.ops import packing

# Places of larger matrices would keep more memory than they save time; they are made anew.
_LARGEST_CACHED = 1024


def pack(full: Tensor) -> Tensor:
    """Lower triangles of square matrices; what is above the diagonal is not read.

    Args:
        full: shape ``[B, d, d]``.

    Returns:
        Shape ``[B, d (d + 1) / 2]``, same dtype.

    Raises:
        ArgumentError: the matrices are not square.
    """
    if full.dim() != 3 or full.shape[1] != full.shape[2]:
        raise ArgumentError(
            f"cannot pack a tensor of shape {tuple(full.shape)}",
            hint="pass square matrices of shape [blocks, size, size]",
        )
    return packing.pack(full)


def unpack(packed: Tensor) -> Tensor:
    """Symmetric matrices from their lower triangles.

    Args:
        packed: shape ``[B, d (d + 1) / 2]``.

    Returns:
        Shape ``[B, d, d]``, same dtype.

    Raises:
        ArgumentError: no size has this many entries.
    """
    size = packed_size(packed)
    flat = packed.index_select(1, _both(size, packed.device))
    return flat.view(len(packed), size, size)


def frobenius(packed: Tensor) -> Tensor:
    """Frobenius norm of the block-diagonal symmetric matrix that is packed.

    Args:
        packed: shape ``[B, d (d + 1) / 2]``.

    Returns:
        float64 of no dimension: squares of float32 numbers stay within its range.

    Raises:
        ArgumentError: no size has this many entries.
    """
    size = packed_size(packed)
    diagonal = packed.index_select(1, _diagonal(size, packed.device))
    lower = torch.linalg.vector_norm(packed, dtype=torch.float64).square()
    twice_counted = torch.linalg.vector_norm(diagonal, dtype=torch.float64).square()
    norm: Tensor = (2 * lower - twice_counted).sqrt()
    return norm


def packed_size(packed: Tensor) -> int:
    """The d of matrices packed to shape ``[B, d (d + 1) / 2]``.

    Raises:
        ArgumentError: no size has this many entries.
    """
    entries = packed.shape[1] if packed.dim() == 2 else 0
    size = (math.isqrt(8 * entries + 1) - 1) // 2
    if entries == 0 or size * (size + 1) // 2 != entries:
        raise ArgumentError(
            f"a tensor of shape {tuple(packed.shape)} does not hold packed matrices",
            hint="pass lower triangles of shape [blocks, size * (size + 1) / 2]",
        )
    return size


def _both(size: int, device: torch.device) -> Tensor:
    """Place in the packed triangle of each entry of the full matrix."""
    return _cached_both(size, device) if size <= _LARGEST_CACHED else _make_both(size, device)


@lru_cache(maxsize=128)
def _diagonal(size: int, device: torch.device) -> Tensor:
    index = torch.arange(size, device=device)
    return index * (index + 3) // 2


def _make_both(size: int, device: torch.device) -> Tensor:
    index = torch.arange(size, device=device)
    first = (index * (index + 1) // 2).to(_places(size))
    # i (i + 1) / 2 + j is the larger one of (i, j) and (j, i) where i >= j.
    place = first[:, None] + index.to(_places(size))
    return torch.maximum(place, place.mT).view(-1)


def _places(size: int) -> torch.dtype:
    """The smallest type that counts all entries of a full matrix."""
    return torch.int32 if size * size < 2**31 else torch.int64


@lru_cache(maxsize=128)
def _cached_both(size: int, device: torch.device) -> Tensor:
    return _make_both(size, device)
