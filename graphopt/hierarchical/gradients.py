"""Solutions and log-determinants that autograd differentiates, in blocks and never densely.

With ``w = A^-T g`` for a gradient g of the solution of ``A x = b``, the gradient of b is w and that
of A is ``-w x.T``, which only ever meets A in a product: ``-w . (dA x)``. The derivative of the
log-determinant is the trace of ``A^-1 dA``, which is a sum over blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from graphopt.hierarchical.blocks import Dense, dense, placed
from graphopt.hierarchical.factorization import Factorization
from graphopt.hierarchical.inverse import inverse
from graphopt.hierarchical.matrix import HMatrix
from graphopt.hierarchical.parts import any_tensor, apply, factors, part


def product(matrix: HMatrix, x: Tensor) -> Tensor:
    """``matrix @ x`` in the original order; autograd passes into the blocks and into x: [n, c]."""
    return matrix.rows.to_original(apply(matrix.root, matrix.columns.to_positions(x)))


def solve(
    matrix: HMatrix | Callable[[Tensor], Tensor], factorization: Factorization, b: Tensor
) -> Tensor:
    """``x`` with ``A x = b``, differentiable in b and in what the matrix is made of.

    Args:
        matrix: the one that was factored, whose blocks may require gradients; or a function that
            multiplies it with [n, c] in the original order, differentiable in its own parameters.
        factorization: of that matrix.
        b: [n] or [n, c].

    Returns:
        The value of ``factorization.solve(b)``, whose bound holds for it.
    """
    found = factorization.solve(b).value
    x = found.reshape(b.shape[0], -1)
    image = product(matrix, x) if isinstance(matrix, HMatrix) else matrix(x)
    rest = _Inverse.apply(b - image.reshape(b.shape), factorization, False)
    return found + (rest - rest.detach())


def logdet(matrix: HMatrix, factorization: Factorization, tolerance: float) -> Tensor:
    """``log |det A|``, differentiable in the blocks of the matrix.

    Args:
        matrix: the one that was factored, whose blocks may require gradients.
        factorization: of that matrix.
        tolerance: of the inverse, and so of the gradient.

    Returns:
        A scalar with the value of ``factorization.logdet()``, whose bound holds for it.
    """
    value = factorization.logdet().value
    weights = inverse(factorization, tolerance).root
    total = torch.zeros((), dtype=matrix.dtype, device=any_tensor(matrix.root).device)
    for place in placed(matrix.root):
        block, (m, n) = place.block, place.block.shape
        # The gradient at block (i, j) is the block (j, i) of the inverse, transposed.
        own = part(weights, (place.column, place.column + n), (place.row, place.row + m))
        if isinstance(block, Dense):
            found = dense(own).T * block.values
        else:
            left, right = factors(block)
            found = apply(own, left) * right
        total = total + found.sum()
    return value + (total - total.detach())


class _Inverse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, b: Tensor, factorization: Factorization, transpose: bool) -> Tensor:
        ctx.factorization, ctx.transpose = factorization, transpose
        return factorization.solve(b, transpose=transpose).value

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        found = _Inverse.apply(gradients[0], ctx.factorization, not ctx.transpose)
        return found, None, None
