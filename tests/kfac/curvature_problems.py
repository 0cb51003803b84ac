"""Random blocks for the tests of solvers, and what they mean as one dense matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from graphopt.runtime.kfac.solve import Problem


def moment(
    blocks: int, size: int, seed: int = 0, *, rows: int = 0, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Positive semi-definite ``[blocks, size, size]``, of rank `rows`; definite without."""
    generator = torch.Generator().manual_seed(seed)
    data = torch.randn(blocks, rows or 3 * size, size, generator=generator, dtype=torch.float64)
    moments = data.mT @ data / data.shape[1]
    # A product computed in blocks is symmetric up to rounding only.
    return (moments / 2 + moments.mT / 2).to(dtype)


def diagonal_moment(blocks: int, size: int, seed: int = 0) -> Tensor:
    """Non-negative ``[blocks, size]``, of diagonal form."""
    return moment(blocks, size, seed).diagonal(dim1=1, dim2=2).contiguous()


def gradient(groups: int, rows: int, columns: int, seed: int = 99) -> Tensor:
    """A random gradient in float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(groups, rows, columns, generator=generator, dtype=torch.float64)


def dense(side: Tensor, group: int = 0, groups: int = 1) -> Tensor:
    """The matrix of one group that the blocks of a side stand for."""
    pieces = side[len(side) // groups * group : len(side) // groups * (group + 1)]
    return torch.block_diag(*(p.diag() if p.dim() == 1 else p for p in pieces))


def layouts() -> dict[str, tuple[Problem, tuple[int, int, int]]]:
    """Blocks of every form, each with the shape ``(groups, rows, columns)`` of its gradient."""
    return {
        "plain": (Problem("w", moment(1, 4, 1), moment(1, 3, 2)), (1, 4, 3)),
        "groups": (Problem("w", moment(2, 3, 3), moment(2, 4, 4)), (2, 3, 4)),
        "left in pieces": (Problem("w", moment(3, 2, 5), moment(1, 5, 6)), (1, 6, 5)),
        "right in pieces": (Problem("w", moment(2, 3, 7), moment(4, 2, 8)), (2, 3, 4)),
        "both in pieces": (Problem("w", moment(6, 2, 9), moment(4, 3, 10)), (2, 6, 6)),
        "diagonal left": (Problem("w", diagonal_moment(1, 5, 11), moment(1, 3, 12)), (1, 5, 3)),
        "diagonal right": (Problem("w", moment(2, 2, 13), diagonal_moment(2, 4, 14)), (2, 2, 4)),
        "both diagonal": (
            Problem("w", diagonal_moment(1, 3, 15), diagonal_moment(1, 4, 16)),
            (1, 3, 4),
        ),
        "one row each": (Problem("w", moment(3, 1, 17), moment(3, 5, 18)), (3, 1, 5)),
    }
