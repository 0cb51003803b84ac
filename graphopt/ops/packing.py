"""Symmetric matrices as their lower triangles, row by row."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

# Up to here one gather is faster than a copy per row, and its index is small enough to be kept.
_LARGEST_GATHER = 1024


def packed_length(size: int) -> int:
    """Entries of the lower triangle of a ``size x size`` matrix."""
    return size * (size + 1) // 2


def pack(matrices: Tensor) -> Tensor:
    """The lower triangles of square matrices.

    Args:
        matrices: [B, d, d]; entries above the diagonal are not read.

    Returns:
        [B, d * (d + 1) / 2]: entry (r, c), c <= r, is at r * (r + 1) / 2 + c.
    """
    batch, size, _ = matrices.shape
    if size <= _LARGEST_GATHER:
        return matrices.reshape(batch, -1).index_select(1, _positions(size, matrices.device))
    packed = matrices.new_empty(batch, packed_length(size))
    start = 0
    for row in range(size):
        packed[:, start : start + row + 1] = matrices[:, row, : row + 1]
        start += row + 1
    return packed


def _positions(size: int, device: torch.device) -> Tensor:
    if device.type == "cpu":
        return _positions_on_cpu(size)
    # Not kept: memory that is taken while a CUDA graph is recorded belongs to that graph.
    return _compute_positions(size, device)


@lru_cache(maxsize=32)
def _positions_on_cpu(size: int) -> Tensor:
    return _compute_positions(size, torch.device("cpu"))


def _compute_positions(size: int, device: torch.device) -> Tensor:
    rows, columns = torch.tril_indices(size, size, dtype=torch.int32, device=device).unbind()
    return rows * size + columns
