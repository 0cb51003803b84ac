"""Products of kernel matrices with one vector: nothing is compressed, and nothing is kept.

Blocks of clusters far from each other are interpolated in Chebyshev points of the bounding boxes,
so many that an analytic bound of the error suffices for this vector; the others are evaluated.
Beside a `from_kernel` matrix of that accuracy this takes one evaluation of each value, no
factorisation and little memory.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from graphopt.hierarchical.admissibility import Pairs, Strong, first, refined
from graphopt.hierarchical.clusters import ClusterTree
from graphopt.hierarchical.interpolation import (
    Boxes,
    Estimate,
    chebyshev,
    lagrange,
    lebesgue,
    nodes_for,
    shifted_by,
)
from graphopt.hierarchical.kernel_sides import chunks
from graphopt.hierarchical.kernels import Analytic
from graphopt.hierarchical.rounding import gamma

_DOUBLE = torch.float64
_MOST = 1024
# Terms of one sum: fewer roundings than in a long one.
_TERMS = 64


@torch.no_grad()
def product(kernel: Analytic, tree: ClusterTree, x: Tensor, budget: float) -> tuple[Tensor, Tensor]:
    """``K x`` and bounds of the error of each of its entries, rounding included.

    Args:
        kernel: symmetric.
        tree: of the points.
        x: [n, 1] float64, in positions.
        budget: of the sum of ``abs(x)`` times the bounds, beside rounding.
    """
    found = _Product(kernel, tree, x, budget)
    found.run()
    return found.total[:-1], found.lost[:-1] * (1 + 1e-9)


class _Product:
    def __init__(self, kernel: Analytic, tree: ClusterTree, x: Tensor, budget: float) -> None:
        assert tree.points is not None
        self.kernel = kernel
        self.tree = tree
        self.points = torch.cat([tree.points, tree.points[-1:]]).to(_DOUBLE)
        self.x = torch.cat([x, x.new_zeros(1, 1)])
        # A bound may be four times that of which the number of nodes is chosen.
        self.share = budget / (4 * (tree.depth + 1))
        self.scales = kernel.scales(self.points.shape[1])
        self.moved = shifted_by(self.points, self.scales)
        # With a row for the places that clusters lack.
        self.total, self.lost = torch.zeros_like(self.x), torch.zeros_like(self.x)

    def run(self) -> None:
        rule, pairs = Strong(1.5), first()
        while True:
            far = rule(self.tree, self.tree, pairs)
            if bool(far.any()) and not self._far(pairs.only(far)):
                far = torch.zeros_like(far)
            pairs = pairs.only(~far)
            finer = refined(self.tree, self.tree, pairs, symmetric=True)
            if finer is None or not len(pairs):
                break
            pairs = finer
        if len(pairs):
            self._evaluated(pairs, self._estimate(pairs))

    def _estimate(self, pairs: Pairs) -> Estimate:
        boxes = Boxes.of(*self.tree.boxes[pairs.row_level], self.scales)
        return Estimate.of(self.kernel, boxes[pairs.rows], boxes[pairs.columns], self.moved)

    def _far(self, pairs: Pairs) -> bool:
        """Whether these blocks were added; if not, smaller ones are better."""
        positions = self.tree.positions[pairs.row_level]
        size, estimate = positions.shape[1], self._estimate(pairs)
        mass = self.x[positions].abs().sum((1, 2))
        weights = 2 * mass[pairs.rows] * mass[pairs.columns]
        share = self.share / math.sqrt(len(pairs))
        nodes = nodes_for(estimate.errors, weights, share, min(_MOST, size - 1))
        if nodes is None and size > _MOST:
            return False
        if nodes is None:
            self._evaluated(pairs, estimate)
            return True
        points, box = self._points(positions), self.tree.boxes[pairs.row_level]
        filled = (positions < len(self.tree)).to(_DOUBLE).unsqueeze(2)
        spread = lagrange(points, *box, nodes).mul_(filled)
        given = _times(spread.mT, self.x[positions])
        found = self._blocks(pairs, chebyshev(*box, nodes), given)
        # Rounding is of the weights that there are, which are less than their Lebesgue constant.
        rows = spread.abs().sum(2, keepdim=True)
        weighted = (rows * self.x[positions].abs()).sum((1, 2))
        wider = 1 + max(lebesgue(count) for count in nodes) * (1 + 1e-9)
        moved = self.moved * self.kernel.slope(estimate.low)
        near = wider * estimate.errors.bounds(nodes, nodes) + moved
        terms = _terms(size) + 2 * _terms(given.shape[1]) + _crowd(pairs)
        terms += 2 * sum(4 * count + 5 for count in nodes)
        own = moved + self.kernel.rounding(estimate.size, len(nodes))
        own = own + gamma(terms, _DOUBLE) * (estimate.size + own)
        lost = _spread(pairs, near, mass) + rows * _spread(pairs, own, weighted)
        self._add(positions, _times(spread, found), lost)
        return True

    def _evaluated(self, pairs: Pairs, estimate: Estimate) -> None:
        positions = self.tree.positions[pairs.row_level]
        found = self._blocks(pairs, self._points(positions), self.x[positions])
        lost = self.kernel.rounding(estimate.size, self.points.shape[1])
        terms = _terms(positions.shape[1]) + _crowd(pairs)
        lost = lost + gamma(terms, _DOUBLE) * (estimate.size + lost)
        mass = self.x[positions].abs().sum((1, 2))
        self._add(positions, found, _spread(pairs, lost, mass).expand_as(found))

    def _blocks(self, pairs: Pairs, at: Tensor, given: Tensor) -> Tensor:
        """[c, k, 1] the sums of blocks at [c, k, d] times [c, k, 1], and of their transposes."""
        found = torch.zeros_like(given)
        once = pairs.rows == pairs.columns
        for part in chunks(len(pairs), at.shape[1] ** 2):
            rows, columns = pairs.rows[part], pairs.columns[part]
            block = self.kernel(at[rows], at[columns])
            found.index_add_(0, rows, _times(block, given[columns]))
            across = torch.where(once[part, None, None], 0.0, given[rows])
            found.index_add_(0, columns, _times(block.mT, across))
        return found

    def _add(self, positions: Tensor, found: Tensor, lost: Tensor) -> None:
        """To the result, with bounds of its error; [c, m, 1]."""
        # Each level is one more sum.
        lost = lost + gamma(self.tree.depth + 1, _DOUBLE) * found.abs()
        self.total.index_add_(0, positions.flatten(), found.flatten(0, 1))
        self.lost.index_add_(0, positions.flatten(), lost.flatten(0, 1))

    def _points(self, positions: Tensor) -> Tensor:
        """[c, m, d]; what clusters lack is their last point."""
        last = torch.where(positions < len(self.tree), positions, -1).amax(1, keepdim=True)
        return self.points[torch.minimum(positions, last)]


def _spread(pairs: Pairs, entries: Tensor, mass: Tensor) -> Tensor:
    """[c, 1, 1] the sums of entries [b] times the masses [c] of the other clusters."""
    found = torch.zeros_like(mass)
    found.index_add_(0, pairs.rows, entries * mass[pairs.columns])
    found.index_add_(0, pairs.columns, entries * mass[pairs.rows])
    return found[:, None, None]


def _times(matrices: Tensor, columns: Tensor) -> Tensor:
    """[b, k, l] times [b, l, 1], in sums of few terms each."""
    found = matrices[..., :_TERMS] @ columns[:, :_TERMS]
    for start in range(_TERMS, columns.shape[1], _TERMS):
        part = slice(start, start + _TERMS)
        found = found + matrices[..., part] @ columns[:, part]
    return found


def _terms(length: int) -> int:
    """How many roundings an entry of `_times` has."""
    return min(length, _TERMS) + length // _TERMS + 1


def _crowd(pairs: Pairs) -> int:
    """The most blocks that one cluster has."""
    return int(torch.cat([pairs.rows, pairs.columns]).bincount().max())
