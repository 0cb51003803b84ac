"""What arithmetic takes: matrices without cores, of one dtype, whose trees fit each other."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from graphopt.errors import ArgumentError
from graphopt.hierarchical.arithmetic.magnitudes import magnitude
from graphopt.hierarchical.blocks import Block, Dense, Grid, LowRank, placed
from graphopt.hierarchical.clusters import ClusterTree
from graphopt.hierarchical.matrix import HMatrix
from graphopt.hierarchical.rounding import gamma, norm

_PROBES = 10


def operand(matrix: HMatrix, name: str) -> HMatrix:
    """The matrix without gradients and without cores, whose rounding is in its bound.

    Raises:
        ArgumentError: it is not float32 or float64, or not finite.
    """
    check_dtypes(matrix.dtype)
    if not math.isfinite(magnitude(matrix.root)) or not math.isfinite(matrix.bound):
        raise ArgumentError(f"{name} has entries that are not finite", hint="mend them first")
    with torch.no_grad():
        root, lost = _plain(matrix.root)
    bound = matrix.bound + lost
    return HMatrix(root, matrix.rows, matrix.columns, bound, confidence=matrix.confidence)


def confidence(*matrices: HMatrix, lost: float = 0.0) -> float:
    """The probability that all their bounds hold, and what else fails with a chance of `lost`."""
    return max(1 - sum(1 - matrix.confidence for matrix in matrices) - lost, 0.0)


def check_tolerance(tolerance: float, dtype: torch.dtype) -> None:
    """Refuse what `dtype` cannot reach.

    Raises:
        ArgumentError: it is below the machine epsilon, or no number in (0, 1).
    """
    reachable = float(torch.finfo(dtype).eps)
    if not 0 < tolerance < 1:  # NaN, too
        raise ArgumentError(
            f"tolerance={tolerance} is no relative error", hint="pass one between 0 and 1"
        )
    if tolerance < reachable:
        raise ArgumentError(
            f"tolerance={tolerance:.3g} is below the precision of {dtype}",
            hint=f"pass at least {reachable:.2g}, or matrices in float64",
        )


def check_dtypes(*found: torch.dtype) -> None:
    """Refuse dtypes that differ, or that have no bound here.

    Raises:
        ArgumentError: they are not all float32, or all float64.
    """
    names = " and ".join(str(dtype) for dtype in dict.fromkeys(found))
    if any(dtype not in (torch.float32, torch.float64) for dtype in found):
        raise ArgumentError(f"no bounds for {names}", hint="convert to float32 or float64")
    if len(set(found)) > 1:
        raise ArgumentError(f"operands of {names}", hint="convert one of them")


def check_same(first: ClusterTree, second: ClusterTree, what: str) -> None:
    """Refuse trees with different positions.

    Args:
        first: a tree.
        second: another one.
        what: both, in words.

    Raises:
        ArgumentError: they have different lengths or orders.
    """
    if len(first) != len(second):
        raise ArgumentError(
            f"{what} do not fit: {len(first)} and {len(second)}", hint="pass matrices that do"
        )
    if first is not second and not torch.equal(first.order, second.order):
        raise ArgumentError(
            f"{what} have different orders", hint="make both matrices with one cluster tree"
        )


def check_square(matrix: HMatrix) -> None:
    """Refuse what is not square.

    Raises:
        ArgumentError: it has more rows than columns, or fewer.
    """
    rows, columns = matrix.shape
    if rows != columns:
        raise ArgumentError(f"a matrix of {rows} x {columns}", hint="pass a square one")


def low_rank_count(block: Block) -> int:
    """How many blocks truncation concerns, at least 1."""
    return max(sum(isinstance(place.block, LowRank) for place in placed(block)), 1)


def estimated_norm(product: Callable[[Tensor], Tensor], columns: int, like: Tensor) -> float:
    """The Frobenius norm of an operator, by random vectors; right to some ten per cent."""
    generator = torch.Generator().manual_seed(columns)
    normal = torch.randn(columns, _PROBES, dtype=torch.float64, generator=generator)
    return norm(product(normal.to(like.device))) / math.sqrt(_PROBES)


def _plain(block: Block) -> tuple[Block, float]:
    if isinstance(block, Dense):
        return (Dense(block.values.detach()) if block.values.requires_grad else block), 0.0
    if isinstance(block, Grid):
        pairs = [[_plain(b) for b in line] for line in block.blocks]
        lost = math.hypot(*(error for line in pairs for _, error in line))
        return Grid(tuple(tuple(b for b, _ in line) for line in pairs)), lost
    if block.core is None:
        if block.left.requires_grad or block.right.requires_grad:
            return LowRank(block.left.detach(), block.right.detach()), 0.0
        return block, 0.0
    lost = gamma(block.core.shape[0], block.left.dtype) * magnitude(block)
    return LowRank((block.left @ block.core).detach(), block.right.detach()), lost
