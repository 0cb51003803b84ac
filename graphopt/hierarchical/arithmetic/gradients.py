"""Derivatives by what a factored matrix is made of, in blocks and never densely.

Those of a solution meet the matrix in a product. The derivative of the log-determinant is the trace
of ``A^-1 dA``, a sum over blocks of their derivatives times the blocks of the inverse across from
them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

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


@dataclass(frozen=True, eq=False)
class Factored:
    """A `System` in the original order: ``matrix + shift * identity`` with its factors.

    Values are those of ``factorization.solve(b)`` and ``factorization.logdet()``, whose bounds hold
    for them. Gradients reach the parameters of the kernel of the matrix, or tensors of its blocks.

    Attributes:
        matrix: that was factored, without the shift.
        factorization: of it.
        tolerance: of the inverse, and so of the gradient of the log-determinant.
        shift: what was added to the diagonal before it was factored, a scalar that gets a gradient;
            None where there is none to get.
    """

    matrix: HMatrix
    factorization: Factorization
    tolerance: float
    shift: Tensor | None = None

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """See `System`: those of the kernel or the tensors, then the shift."""
        own = self.matrix.packed.parameters or self._tensors
        return own if self.shift is None else (*own, self.shift)

    def solve(self, b: Tensor, transpose: bool = False) -> Tensor:
        """See `System`."""
        return self.factorization.solve(b, transpose=transpose).value

    def inner_gradient(self, w: Tensor, v: Tensor) -> list[Tensor]:
        """See `System`."""
        matrix = self.matrix
        left = matrix.rows.to_positions(w).reshape(len(w), -1)
        right = matrix.columns.to_positions(v).reshape(len(v), -1)
        if matrix.packed.parameters:
            found = matrix.inner_gradient(left, right)
        else:
            with torch.enable_grad():
                found = self._by_tensors((left * apply(matrix.root, right)).sum())
        return found if self.shift is None else [*found, (w * v).sum()]

    def log_determinant(self) -> float:
        """See `System`."""
        return self.factorization.logdet().value

    def log_determinant_gradient(self) -> list[Tensor]:
        """See `System`."""
        weights = inverse(self.factorization, self.tolerance).root
        if self.matrix.packed.parameters:
            found = _kernel_gradients(self.matrix.packed, weights)
        else:
            with torch.enable_grad():
                total = any_tensor(weights).new_zeros(())
                for place in placed(self.matrix.root):
                    total = total + _product(place, weights)
                found = self._by_tensors(total)
        return found if self.shift is None else [*found, diagonal(weights).sum()]

    @cached_property
    def _tensors(self) -> tuple[Tensor, ...]:
        """All of the blocks that require a gradient."""
        found = [t for place in placed(self.matrix.root) for t in vars(place.block).values()]
        return tuple(t for t in found if t is not None and t.requires_grad)

    def _by_tensors(self, total: Tensor) -> list[Tensor]:
        if not self._tensors:
            return []
        return list(torch.autograd.grad(total, self._tensors, materialize_grads=True))


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
