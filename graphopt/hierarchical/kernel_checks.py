"""What is known of a kernel matrix from its arguments and a few of its values."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from graphopt.errors import ArgumentError
from graphopt.hierarchical.clusters import ClusterTree
from graphopt.hierarchical.kernels import Kernel

_SAMPLES = 20000
# Of the value for equal points: entries below that are zero, as far as rounding can tell.
ZERO = 1e-12


def check_arguments(
    rows: ClusterTree, columns: ClusterTree, tolerance: float, dtype: torch.dtype
) -> None:
    """Refuse what no kernel matrix can be made of.

    Raises:
        ArgumentError: clusters without points or of different spaces, or no such tolerance or
            dtype.
    """
    if not 0 < tolerance < 1:
        raise ArgumentError(f"a tolerance of {tolerance}", hint="pass one between 0 and 1")
    if rows.points is None or columns.points is None:
        raise ArgumentError("clusters by index have no points", hint="build trees by `by_points`")
    if rows.points.shape[1] != columns.points.shape[1]:
        raise ArgumentError(
            f"points of {rows.points.shape[1]} and of {columns.points.shape[1]} coordinates",
            hint="pass points of one space",
        )
    if dtype not in (torch.float32, torch.float64):
        raise ArgumentError(f"blocks cannot be stored in {dtype}", hint="pass torch.float32")


def not_finite() -> ArgumentError:
    """A kernel has values that no block can hold."""
    return ArgumentError(
        "the kernel is not finite at all points",
        hint="state its value for equal points, and scale points that are too large to be squared",
    )


@torch.no_grad()
def zero_norm(kernel: Kernel, points: Tensor, entries: int) -> float:
    """Below this Frobenius norm a matrix of so many entries is one of zeros; points: [m, d]."""
    most = float(kernel(points[:1], points[:1]).double().abs().max())
    return ZERO * most * math.sqrt(entries)


@torch.no_grad()
def sampled_norm(kernel: Kernel, rows: Tensor, columns: Tensor, *, one: bool, sure: bool) -> float:
    """A guess of the Frobenius norm, from random entries and the diagonal.

    Args:
        kernel: any.
        rows: [m, d].
        columns: [n, d].
        one: rows and columns are the same, and half of the matrix will stand for all of it.
        sure: whether the kernel is known to be symmetric.

    Raises:
        ArgumentError: values of another shape, not finite, or different across the diagonal.
    """
    generator = torch.Generator().manual_seed(0)
    own, other = (
        side[torch.randint(0, len(side), (_SAMPLES,), generator=generator)].unsqueeze(1)
        for side in (rows, columns)
    )
    values = kernel(own, other)
    if not isinstance(values, Tensor) or values.shape != (_SAMPLES, 1, 1):
        raise ArgumentError(
            f"the kernel maps points {list(own.shape)} and {list(other.shape)} to "
            f"{list(getattr(values, 'shape', [])) or type(values).__name__}",
            hint="return a tensor of [..., m, n] for points [..., m, d] and [..., n, d]",
        )
    if not bool(values.isfinite().all()):
        raise not_finite()
    if one and not sure:
        far = float((values - kernel(other, own)).abs().max())
        if far > 1e-6 * float(values.abs().max()):
            raise ArgumentError("the kernel is not symmetric", hint="pass the tree as columns, too")
    found = values.double().square().mean() * len(rows) * len(columns)
    if one:
        here = rows.unsqueeze(1)
        found = torch.maximum(found, kernel(here, here).double().square().sum())
    return float(found.sqrt())
