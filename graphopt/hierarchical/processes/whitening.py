"""An approximate factor L of a positive definite matrix, in HODLR form, that is never indefinite.

With L1, L2 the factors of the diagonal blocks of a node, its off-diagonal block M becomes
L1^-1 M L2^-T, which is cut to U diag(s) V^T with orthonormal U, V and s < 1. Then

    [A1, M; M^T, A2]  ~=  [L1, 0; 0, L2] (I + [0, U s V^T; V s U^T, 0]) [L1, 0; 0, L2]^T

and the eigenvectors of the middle are (u, v) / sqrt(2) with 1 + s and (u, -v) / sqrt(2) with 1 - s,
so that its roots and inverses need no further factorisation. This is the scaling and compression of
Xia and Xin, Effective and robust preconditioning of general SPD matrices via structured incomplete
factorization, SIAM J. Matrix Anal. Appl. 38 (2017), with the symmetric root in place of Cholesky.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from graphopt.hierarchical.clusters import ClusterTree


@dataclass(frozen=True, eq=False)
class Layout:
    """Rows in leaves of equal size: what is missing of a leaf are rows of the identity.

    Attributes:
        depth: the level whose clusters are the leaves.
        size: rows of a leaf.
        places: [n] the padded row of each position.
    """

    depth: int
    size: int
    places: Tensor

    @classmethod
    def of(cls, tree: ClusterTree, leaf: int) -> Layout:
        """The coarsest level whose clusters have at most `leaf` positions, or the last."""
        depth, size = 0, len(tree)
        while size > leaf and depth < tree.depth:
            depth, size = depth + 1, (size + 1) // 2
        parts = [
            torch.arange(cluster.size) + number * size
            for number, cluster in enumerate(tree.level(depth))
        ]
        return cls(depth, size, torch.cat(parts))

    @property
    def rows(self) -> int:
        """With padding."""
        return self.size << self.depth

    def pad(self, values: Tensor) -> Tensor:
        """[n, k] to [rows, k], with zeros."""
        if self.rows == values.shape[0]:
            return values.clone()
        found = values.new_zeros(self.rows, *values.shape[1:])
        found[self.places] = values
        return found

    def cut(self, values: Tensor) -> Tensor:
        """[rows, k] to [n, k]."""
        return values if self.rows == len(self.places) else values[self.places]


@dataclass(frozen=True, eq=False)
class Coupling:
    """The middle matrices of all nodes of one level.

    Attributes:
        left: U, [nodes, rows of a child, r].
        right: V, like `left`.
        values: s, [nodes, r], below 1; zeros where a node needs fewer.
    """

    left: Tensor
    right: Tensor
    values: Tensor

    @property
    def rank(self) -> int:
        """Of all nodes."""
        return self.values.shape[1]

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return sum(t.numel() * t.element_size() for t in (self.left, self.right, self.values))

    def function(self, f: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """``(a, b)`` of f(middle) = I + [U a U^T, U b V^T; V b U^T, V a V^T], each [nodes, r]."""
        plus, minus = f(1 + self.values), f(1 - self.values)
        return (plus + minus) / 2 - 1, (plus - minus) / 2

    def apply_(self, f: Callable[[Tensor], Tensor], values: Tensor) -> None:
        """Multiply [rows, k] by f(middle), in place."""
        if not self.rank:
            return
        nodes, rows, _ = self.left.shape
        halves = values.view(nodes, 2, rows, -1)
        first, second = halves[:, 0], halves[:, 1]
        a, b = (weight.unsqueeze(2) for weight in self.function(f))
        p, q = self.left.mT @ first, self.right.mT @ second
        first.baddbmm_(self.left, a * p + b * q)
        second.baddbmm_(self.right, b * p + a * q)


@dataclass(frozen=True, eq=False)
class Whitening:
    """L, by its inverse: a matrix A that is nearly L L^T becomes nearly the identity.

    Panels are in padded rows, see `Layout`.

    Attributes:
        layout: of rows.
        leaves: [leaves, size, size] inverses of the Cholesky factors of the leaves, lower.
        levels: from the deepest to the root; the couplings found so far.
    """

    layout: Layout
    leaves: Tensor
    levels: tuple[Coupling, ...] = ()

    @property
    def ranks(self) -> tuple[int, ...]:
        """Of the levels, from the root."""
        return tuple(coupling.rank for coupling in reversed(self.levels))

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        own = self.leaves.numel() * self.leaves.element_size()
        return own + sum(coupling.nbytes for coupling in self.levels)

    def log_determinant(self) -> Tensor:
        """Of L L^T, in float64."""
        total = -2 * self.leaves.double().diagonal(dim1=1, dim2=2).log().sum()
        for coupling in self.levels:
            total = total + torch.log1p(-coupling.values.double().square()).sum()
        return total

    def forward(self, values: Tensor) -> Tensor:
        """L^-1 times [rows, k]."""
        blocks = values.view(*self.leaves.shape[:2], -1)
        found = (self.leaves @ blocks).view_as(values)
        for coupling in self.levels:
            coupling.apply_(torch.rsqrt, found)
        return found

    def backward(self, values: Tensor) -> Tensor:
        """L^-T times [rows, k]."""
        found = values.clone()
        for coupling in reversed(self.levels):
            coupling.apply_(torch.rsqrt, found)
        blocks = found.view(*self.leaves.shape[:2], -1)
        return (self.leaves.mT @ blocks).view_as(values)

    def solve(self, values: Tensor) -> Tensor:
        """(L L^T)^-1 times [n, k], in positions."""
        return self.layout.cut(self.backward(self.forward(self.layout.pad(values))))
