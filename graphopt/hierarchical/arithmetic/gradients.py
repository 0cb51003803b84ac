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

from graphopt.hierarchical.arithmetic.factorization import Factorization
from graphopt.hierarchical.arithmetic.inverses import inverse
from graphopt.hierarchical.arithmetic.parts import any_tensor, apply, diagonal, factors, part
from graphopt.hierarchical.blocks import (
    Block,
    Dense,
    LowRank,
    Placed,
    dense,
    placed,
    transposed,
)
from graphopt.hierarchical.clusters import ClusterTree
from graphopt.hierarchical.groups import Group, add_derivatives
from graphopt.hierarchical.matrix import HMatrix
from graphopt.hierarchical.packed import Packed


def solve(
    matrix: HMatrix | Callable[[Tensor], Tensor], factorization: Factorization, b: Tensor
) -> Tensor:
    """``x`` with ``A x = b``, differentiable in b and in what the matrix is made of.

    Args:
        matrix: the one that was factored: gradients reach the parameters of its kernel, or tensors
            of its blocks. Or a function that multiplies it with [n, c] in the original order.
        factorization: of that matrix.
        b: [n] or [n, c], in the dtype of the matrix.

    Returns:
        The value of ``factorization.solve(b)``, whose bound holds for it.
    """
    found = factorization.solve(b).value
    x = found.reshape(b.shape[0], -1)
    image = matrix @ x if isinstance(matrix, HMatrix) else matrix(x)
    image = image.reshape(b.shape)
    rest: Tensor = _Inverse.apply(b - image, factorization, False)  # type: ignore[no-untyped-call]
    return found + (rest - rest.detach())


def logdet(
    matrix: HMatrix, factorization: Factorization, tolerance: float, shift: Tensor | None = None
) -> Tensor:
    """``log |det A|``, differentiable in what the matrix is made of.

    Args:
        matrix: the one that was factored: gradients reach the parameters of its kernel, or tensors
            of its blocks.
        factorization: of that matrix.
        tolerance: of the inverse, and so of the gradient.
        shift: what was added to the diagonal of `matrix` before it was factored, a scalar that
            gets its gradient, too.

    Returns:
        A scalar with the value of ``factorization.logdet()``, whose bound holds for it.
    """
    value = factorization.logdet().value
    weights = inverse(factorization, tolerance).root
    total = torch.zeros((), dtype=torch.float64, device=any_tensor(weights).device)
    if matrix.packed.parameters:
        found = _kernel_gradients(matrix.packed, weights)
        parameters = matrix.packed.parameters
        total = total + _Linear.apply(found, *parameters)  # type: ignore[no-untyped-call]
    elif matrix.packed.trainable:
        for place in placed(matrix.root):
            total = total + _product(place, weights)
    if shift is not None:
        total = total + shift * diagonal(weights).sum()
    return value + (total - total.detach())


# -- helpers ---------------------------------------------------------------------------------------


def _product(place: Placed, weights: Block) -> Tensor:
    """The sum of the products of the entries of a block with the gradients by them."""
    block, (m, n) = place.block, place.block.shape
    own = _facing(weights, place.row, m, place.column, n)
    if isinstance(block, Dense):
        return (dense(own) * block.values).sum()
    left, right = factors(block)
    return (apply(own, left, transpose=True) * right).sum()


def _facing(weights: Block, row: int, m: int, column: int, n: int) -> Block:
    """[m, n] the gradient at a block: that of the inverse across the diagonal, transposed."""
    return transposed(part(weights, (column, column + n), (row, row + m)))


def _kernel_gradients(packed: Packed, weights: Block) -> list[Tensor]:
    """Derivatives of the log-determinant by the parameters of the kernel.

    As in `Packed.inner_gradient`, pieces of the kernel are evaluated again for their derivatives.
    """
    total = [torch.zeros_like(p) for p in packed.parameters]
    for group in packed.groups:
        if group.source is None:
            continue
        for own in group.chunks(slice(0, len(group.pairs)), group.tensors[0][0].numel()):
            gradients = _group_gradients(group, own, packed.rows, packed.columns, weights)
            add_derivatives(total, packed.parameters, group.source, own, gradients)
    return total


def _group_gradients(
    group: Group, own: slice, rows: ClusterTree, columns: ClusterTree, weights: Block
) -> Tensor:
    """[b, ...] by the cores of low-rank blocks, or the values of dense ones."""
    pairs, result = group.pairs, torch.zeros_like(group.tensors[0][own])
    for number in range(own.start, own.stop):
        row = _span(rows, pairs.row_level, int(pairs.rows[number]))
        column = _span(columns, pairs.column_level, int(pairs.columns[number]))
        m, n = row[1] - row[0], column[1] - column[0]
        places = [_facing(weights, row[0], m, column[0], n)]
        if group.mirrored:
            places.append(transposed(_facing(weights, column[0], n, row[0], m)))
        block = group.block(number, m, n)
        for place in places:
            if isinstance(block, LowRank):
                result[number - own.start] += block.left.T @ apply(place, block.right)
            else:
                result[number - own.start, :m, :n] += dense(place)
    return result


def _span(tree: ClusterTree, level: int, index: int) -> tuple[int, int]:
    starts = tree.starts[level]
    return int(starts[index]), int(starts[index + 1])


class _Inverse(torch.autograd.Function):
    """``A^-1 b``, linear in b, and so its own derivative."""

    @staticmethod
    def forward(ctx: Any, b: Tensor, factorization: Factorization, transpose: bool) -> Tensor:
        ctx.factorization, ctx.transpose = factorization, transpose
        return factorization.solve(b, transpose=transpose).value

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        solve = _Inverse.apply
        found = solve(gradients[0], ctx.factorization, not ctx.transpose)  # type: ignore[no-untyped-call]
        return found, None, None


class _Linear(torch.autograd.Function):
    """0, with derivatives by parameters that are known."""

    @staticmethod
    def forward(ctx: Any, gradients: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients)
        return torch.zeros((), dtype=torch.float64, device=parameters[0].device)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(gradients[0].to(own.dtype) * own for own in ctx.saved_tensors)
