"""Inverses of sides that are kept as low rank plus a diagonal.

With D the diagonal of A - RᵀR, which is not negative, and S = (D + damping)⁻¹, the identity of
Woodbury gives

    (RᵀR + D + damping I)⁻¹ = S - Wᵀ W,    W = L⁻¹ R S,    L Lᵀ = I + R S Rᵀ,

with a Cholesky factorisation of the size of the rank. It is kept as W and S.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from graphopt.errors import ArgumentError
from graphopt.ops.low_rank import rest


def invert(matrices: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    """W ``[B, r, d]`` and S ``[B, d]``; with NaN where a matrix is not positive definite.

    Args:
        matrices: ``[B, r + 1, d]``, r rows and the diagonal.
        damping: what is added to the diagonals, ``[B]``.
    """
    rows = matrices[:, :-1]
    scale = (rest(rows, matrices[:, -1]) + damping[:, None]).reciprocal()
    wide = rows * scale[:, None]
    core = wide @ rows.mT
    core.diagonal(dim1=1, dim2=2).add_(1.0)
    factor, info = torch.linalg.cholesky_ex(core)
    failed = (info != 0)[:, None] | (scale <= 0)
    scale = scale.masked_fill(failed, math.nan)
    return torch.linalg.solve_triangular(factor, wide, upper=False), scale


def multiply(rows: Tensor, scale: Tensor, pieces: Tensor) -> Tensor:
    """Multiplies pieces ``[B, d, m]`` by the inverses.

    Raises:
        ArgumentError: the sizes differ.
    """
    if rows.shape[2] != pieces.shape[1]:
        raise ArgumentError(
            f"blocks of {pieces.shape[1]} rows do not fit inverses of size {rows.shape[2]}",
            hint="apply the solution to the gradient of the block that was solved",
        )
    rows, scale = rows.to(pieces.dtype), scale.to(pieces.dtype)
    return scale[..., None] * pieces - rows.mT @ (rows @ pieces)
