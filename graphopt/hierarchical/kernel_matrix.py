"""A kernel matrix in blocks, built from the kernel function without ever forming the matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import cast

import torch
from torch import Tensor

from graphopt.errors import ArgumentError
from graphopt.hierarchical.admissibility import Admissibility, Pairs, Strong, first, refined
from graphopt.hierarchical.clusters import ClusterTree
from graphopt.hierarchical.group_kinds import Coupled, Tiles
from graphopt.hierarchical.groups import Group, Source
from graphopt.hierarchical.interpolation import Boxes, Estimate, nodes_for, shifted_by
from graphopt.hierarchical.kernel_checks import (
    ZERO,
    check_arguments,
    not_finite,
    sampled_norm,
    zero_norm,
)
from graphopt.hierarchical.kernel_derivatives import Stored, by_scales
from graphopt.hierarchical.kernel_sides import Basis, Side, Values, chunks, shaping
from graphopt.hierarchical.kernels import Analytic, Kernel, Radial, parameters
from graphopt.hierarchical.matrix import HMatrix
from graphopt.hierarchical.packed import Packed, sorted_by_ancestor
from graphopt.hierarchical.rounding import gamma, norms, storage

_DOUBLE = torch.float64
# Clusters up to this size may be their own nodes; boxes have no more nodes than that.
_MOST = 1024
# Parts of the tolerance for interpolation, for what rounding may add to it, and for both together
# with the truncation of bases.
_INTERPOLATION, _ROUNDING, _TOGETHER = 0.3, 0.5, 0.95
# How much the errors of derivatives weigh in the choice of bases.
_CHANGED = 0.2
# Random columns for the bases of clusters at first, beside those that make sure.
_SAMPLES = 48


def from_kernel(
    kernel: Kernel,
    rows: ClusterTree,
    columns: ClusterTree | None = None,
    *,
    tolerance: float = 1e-6,
    rule: Admissibility | None = None,
    dtype: torch.dtype = _DOUBLE,
) -> HMatrix:
    """The matrix of a kernel at the points of two trees.

    Blocks of clusters far from each other are ``left @ core @ right.T`` with bases that belong to
    the clusters. Kernels are interpolated in Chebyshev points of the bounding boxes, so many that
    an analytic bound of the error says enough; small clusters are evaluated themselves. Bases are
    cut to what the kernel needs, with residuals that are measured. Work and memory grow with the
    number of points times a power of log(1 / tolerance).

    Args:
        kernel: for instance `Matern32(scale=0.2)`; evaluated in float64. Of a function that is not
            `Analytic` all entries are evaluated, though never kept: work is quadratic.
        rows: clusters of points.
        columns: those of the other argument; None for the rows', where the kernel has to be
            symmetric.
        tolerance: of the Frobenius norm of the error, relative to that of the matrix.
        rule: which clusters are far from each other; None for `Strong(1.5)`. Clusters that touch,
            as those of `Weak` do, cannot be interpolated: all their entries are evaluated.
        dtype: what values are stored in.

    Returns:
        A matrix whose products are differentiable by the kernel's parameters. Its bound is at most
        `tolerance` times its norm; or, where entries are that small and so much was not asked for,
        1e-12 of the value for equal points for each.

    Raises:
        ArgumentError: a tolerance below what the dtype reaches; clusters without points; a kernel
            that is not finite, has another shape or, with one tree, is not symmetric.
    """
    other = rows if columns is None else columns
    check_arguments(rows, other, tolerance, dtype)
    builder = _Builder(kernel, rows, other, columns is None, rule or Strong(1.5), dtype)
    # Sampled, hence a guess; what counts is the comparison afterwards.
    here, there = (points[:-1] for points in builder.points)
    sure = builder.analytic is not None
    size = sampled_norm(kernel, here, there, one=builder.symmetric, sure=sure)
    zero = zero_norm(kernel, here, len(rows) * len(other)) if tolerance >= ZERO else 0.0
    best = math.inf
    for _ in range(4):
        try:
            groups, error = builder.groups(max(tolerance * size, zero / 2))
        except torch.linalg.LinAlgError:
            raise not_finite() from None
        packed = Packed(groups, rows, other, parameters(kernel), builder.derivative_bounds)
        norm = packed.norm * (1 - max(1e-9, 64 * storage(dtype))) - error
        if not math.isfinite(error):
            raise not_finite()
        if error <= max(tolerance * norm, zero):
            return HMatrix(None, rows, other, error, packed)
        reached = error / norm if norm > 0 else math.inf
        if reached > best / 2:
            break
        best = reached
        size = min(norm if norm > 0 else size, size) * min(1.0, tolerance / reached) * 0.7
    raise ArgumentError(
        f"a relative error of {tolerance:.1e} is out of reach of {dtype}: "
        f"{min(best, reached):.1e} was reached",
        hint="pass a larger tolerance, or dtype=torch.float64",
    )


class _Builder:
    def __init__(
        self,
        kernel: Kernel,
        rows: ClusterTree,
        columns: ClusterTree,
        symmetric: bool,
        rule: Admissibility,
        dtype: torch.dtype,
    ) -> None:
        self.kernel = kernel
        self.trees = rows, columns
        self.symmetric = symmetric
        self.rule = rule
        self.dtype = dtype
        # What is stored beside the blocks; None if derivatives are not known in closed form.
        self.changes = by_scales(kernel) if parameters(kernel) else None
        self.missed: list[float] = []
        self.points = tuple(_padded_points(tree) for tree in self.trees)
        self.dimensions = self.points[0].shape[1]
        self.analytic = cast(Analytic, kernel) if hasattr(kernel, "majorant") else None
        if self.analytic is not None:
            self.scales = self.analytic.scales(self.dimensions)
            self.moved = max(shifted_by(points, self.scales) for points in self.points)

    @property
    def derivative_bounds(self) -> tuple[float, ...]:
        """Of the Frobenius norms of the errors of the changes."""
        return tuple(math.sqrt(square) * (1 + 1e-12) for square in self.missed)

    def groups(self, budget: float) -> tuple[list[Group], float]:
        """All blocks, and a bound of the error of all of them."""
        rows, columns = self.trees
        share = budget / math.sqrt(max(1, rows.depth + columns.depth) / 2 + 1)
        groups: list[Group] = []
        squares = 0.0
        self.missed = [0.0] * len(self.changes or ())
        pairs = first()
        while True:
            admissible = self.rule(rows, columns, pairs)
            if bool(admissible.any()):
                far = sorted_by_ancestor(pairs.only(admissible), rows, columns)
                made = self._far(far, share)
                if made is None:
                    admissible = torch.zeros_like(admissible)
                else:
                    groups.append(made[0])
                    squares += made[1] ** 2
            pairs = pairs.only(~admissible)
            finer = refined(rows, columns, pairs, self.symmetric)
            if finer is None or not len(pairs):
                break
            pairs = finer
        pairs = sorted_by_ancestor(pairs, rows, columns)
        diagonal = pairs.rows == pairs.columns
        parts = [(pairs, False)]
        if self.symmetric:
            parts = [(pairs.only(diagonal), False), (pairs.only(~diagonal), True)]
        for own, mirrored in parts:
            if len(own):
                tiles, error = self._near(own, mirrored)
                groups.append(tiles)
                squares += error**2
        return groups, math.sqrt(squares) * (1 + 1e-12)

    def _at(self, side: int, level: int) -> Tensor:
        """[c, m, d] the points of clusters; what clusters lack is their last point again."""
        own = self.trees[side].positions[level]
        last = self.trees[side].starts[level][1:].unsqueeze(1) - 1
        return self.points[side][torch.minimum(own, last)]

    def _filled(self, side: int, level: int) -> Tensor:
        """[c, m] 1.0 where a cluster has a point, else 0.0."""
        return (self.trees[side].positions[level] < len(self.trees[side])).double()

    @torch.no_grad()
    def _near(self, pairs: Pairs, mirrored: bool) -> tuple[Tiles, float]:
        own, other = self._at(0, pairs.row_level), self._at(1, pairs.column_level)
        filled = self._filled(0, pairs.row_level), self._filled(1, pairs.column_level)
        full = bool(filled[0].all()) and bool(filled[1].all())

        def evaluated(kernel: Kernel, part: slice) -> Tensor:
            rows, columns = pairs.rows[part], pairs.columns[part]
            found = kernel(own[rows], other[columns])
            if full:
                return found
            return found * (filled[0][rows].unsqueeze(2) * filled[1][columns].unsqueeze(1))

        def stored(kernel: Kernel) -> tuple[Tensor, float]:
            values = torch.empty(len(pairs), own.shape[1], other.shape[1], dtype=self.dtype)
            squares = 0.0
            for part in chunks(len(pairs), values[0].numel()):
                exact = evaluated(kernel, part).double()
                values[part] = exact
                error = exact.new_zeros(len(exact))
                if self.analytic is not None:
                    bound = cast(Analytic, kernel).rounding
                    error = norms(bound(exact.abs(), self.dimensions))
                if self.dtype is not _DOUBLE:
                    error = error + norms(exact - values[part].double())
                squares += float(error.square().sum())
            return values, squares * (1 + mirrored)

        values, squares = stored(self.kernel)
        source: Source = partial(evaluated, self.kernel)
        if self.changes is not None:
            changes = [stored(change) for change in self.changes]
            self._miss([missed for _, missed in changes])
            source = Stored(cast(Radial, self.kernel), values, tuple(own for own, _ in changes))
        tiles = Tiles(pairs, values, mirrored=mirrored, source=source, work=values[0].numel())
        return tiles, math.sqrt(squares)

    def _miss(self, squares: Sequence[float]) -> None:
        """Add to the squared errors of the changes."""
        self.missed = [a + b for a, b in zip(self.missed, squares, strict=True)]

    @torch.no_grad()
    def _far(self, pairs: Pairs, share: float) -> tuple[Coupled, float] | None:
        """The blocks of a level and a bound of their error; None if evaluating them costs too much.

        That is if kernels cannot be interpolated by few nodes on clusters that have many points.
        """
        sizes = [
            tree.positions[level].shape[1]
            for tree, level in zip(self.trees, _levels(pairs), strict=True)
        ]
        weight = math.sqrt(math.prod(sizes) * (1 + self.symmetric))
        nodes, entry, lost = self._interpolation(pairs, sizes, share / weight)
        if nodes is None and max(sizes) > _MOST:
            return None
        own = self._side(0, pairs.row_level, nodes)
        sides = own, own if self.symmetric else self._side(1, pairs.column_level, nodes)
        values = Values(self.kernel, pairs, sides)
        budget = _TOGETHER * share - float((entry + lost).norm()) * weight
        found, samples = self._bases(values, budget)
        bases = found[0], found[-1]
        while True:
            group, rest = self._cores(values, bases[0].columns(), bases[1].columns())
            if float(rest.norm()) <= budget:
                break
            grown = [basis.more() for basis in found]
            if not any(grown):
                break
        if self.changes is not None:
            group = self._changed(group, sides, bases, nodes, weight)
        elif parameters(self.kernel):
            source, work = values.source(bases, samples)
            group = replace(group, source=source, work=work)
        return group, float(((entry + lost) * weight + rest).norm())

    def _changed(
        self,
        group: Coupled,
        sides: tuple[Side, Side],
        bases: tuple[Basis, Basis],
        nodes: list[int] | None,
        weight: float,
    ) -> Coupled:
        """With the derivatives of its cores, whose errors are noted."""
        assert self.changes is not None
        cores, squares = [], []
        for change in self.changes:
            values = Values(change, group.pairs, sides, keep=False)
            own, rest = self._cores(values, *(basis.columns() for basis in bases))
            if nodes is not None:
                entry, lost = self._estimate(change, group.pairs).bounds(nodes)
                rest = rest + (entry + lost) * weight
            cores.append(own.cores)
            squares.append(float(rest.square().sum()))
        self._miss(squares)
        kernel = cast(Radial, self.kernel)
        return replace(group, source=Stored(kernel, group.cores, tuple(cores)), work=1)

    def _interpolation(
        self, pairs: Pairs, sizes: list[int], share: float
    ) -> tuple[list[int] | None, Tensor, Tensor]:
        """How many nodes each direction needs; None if points are to be evaluated themselves.

        Also [b] bounds of the error of an entry, and of what rounding adds to it.
        """
        zero = torch.zeros(len(pairs), dtype=_DOUBLE)
        if self.analytic is None:
            return None, zero, zero
        estimate = self._estimate(self.analytic, pairs)
        most = min(_MOST, max(sizes) - 1)
        nodes = nodes_for(estimate.errors, torch.ones_like(zero), _INTERPOLATION * share, most)
        if nodes is None:
            return None, zero, zero
        entry, lost = estimate.bounds(nodes)
        if float(lost.norm()) > _ROUNDING * share:
            return None, zero, zero
        return nodes, entry, lost

    def _estimate(self, kernel: Analytic, pairs: Pairs) -> Estimate:
        own, other = (
            Boxes.of(*tree.boxes[level], self.scales)
            for tree, level in zip(self.trees, _levels(pairs), strict=True)
        )
        return Estimate.of(kernel, own[pairs.rows], other[pairs.columns], self.moved)

    def _side(self, side: int, level: int, nodes: list[int] | None) -> Side:
        points, filled = self._at(side, level), self._filled(side, level)
        if nodes is None:
            return Side.direct(points, filled)
        return Side.interpolated(points, filled, *self.trees[side].boxes[level], nodes)

    def _bases(self, values: Values, budget: float) -> tuple[list[Basis], list[Tensor]]:
        """Orthonormal columns for the clusters of both sides, only one of them if it is symmetric.

        Also the samples [c, k, q] at nodes that they are from: products of all blocks of a cluster
        with random matrices (Halko, Martinsson and Tropp 2011), and products of the blocks'
        derivatives by parameters that change their span.
        """
        most = max(side.coefficients for side in values.sides)
        count = min(most, _SAMPLES) + 8
        while True:
            samples = self._samples(values, count)
            found = [
                Basis.of(side.mixed(sample), budget)
                for side, sample in zip(values.sides, samples, strict=False)
            ]
            # Far fewer are needed than were sampled, or all are there.
            if count > most or max(basis.rank for basis in found) <= count - 8:
                return found, samples
            count = min(2 * count, most + 8)

    def _samples(self, values: Values, count: int) -> list[Tensor]:
        """[c, k, q] sums of blocks times random matrices, of rows and of columns."""
        pairs, sides = values.pairs, values.sides
        generator = torch.Generator().manual_seed(0)
        changed = shaping(self.kernel)
        kinds = 1 + sum(parameter.numel() for parameter in changed)
        changes = self.changes or ()
        random, total = [], []
        for side in sides:
            clusters, nodes = side.at.shape[:2]
            shape = clusters, side.coefficients, count
            noise = torch.randn(shape, generator=generator, dtype=_DOUBLE) / math.sqrt(count)
            random.append(side.unmixed(noise))
            total.append(noise.new_zeros(kinds, clusters, nodes, count))
        if self.symmetric:
            random[1], total[1] = random[0], total[0]

        def changes_of(part: slice) -> list[Tensor]:
            if self.changes is None:
                return values.derivatives(part, changed)
            return [_CHANGED * values.evaluated(change, part) for change in changes]

        for part, kernel in values:
            rows, columns = pairs.rows[part], pairs.columns[part]
            for kind, block in enumerate([kernel, *changes_of(part)]):
                total[0][kind].index_add_(0, rows, block @ random[1][columns])
                total[1][kind].index_add_(0, columns, block.mT @ random[0][rows])
        return [torch.cat(list(own), 2) for own in total[: 2 - self.symmetric]]

    def _cores(self, values: Values, left: Tensor, right: Tensor) -> tuple[Coupled, Tensor]:
        """The group, and [b] bounds of the error of its blocks beside that of interpolation."""
        pairs, (own, other) = values.pairs, values.sides
        basis, moved, stretch = own.basis(left, self.dtype)
        across = basis, moved, stretch
        if not self.symmetric:
            across = other.basis(right, self.dtype)
        cores = torch.empty(len(pairs), left.shape[2], right.shape[2], dtype=self.dtype)
        rest = torch.zeros(len(pairs), dtype=_DOUBLE)
        long = gamma(max(own.at.shape[1], other.at.shape[1]) + 2, _DOUBLE)
        short = gamma(max(left.shape[2], right.shape[2]) + 2, _DOUBLE)
        mixing, mixing_across = own.mixing, other.mixing
        for part, kernel in values:
            rows, columns = pairs.rows[part], pairs.columns[part]
            block, u, v = values.coefficients(part, kernel), left[rows], right[columns]
            cores[part] = u.mT @ block @ v
            core, most = cores[part].double(), norms(kernel)
            size = norms(core)
            if own.mix is None and self.analytic is not None:
                # Of nodes the largest possible value is known, here those that there are.
                bound = cast(Analytic, values.kernel).rounding
                rounded = norms(bound(kernel.abs(), self.dimensions))
                rest[part] = rounded
            error = norms(block - u @ core @ v.mT) + 2 * short * norms(u) * size * norms(v)
            error = error + short * norms(block)
            error = error + 2 * long * mixing[rows] * most * mixing_across[columns]
            error = error * own.stretch * other.stretch
            error = error + own.lost[rows] * most * other.size[columns]
            error = error + own.size[rows] * most * other.lost[columns]
            away = moved[rows] * across[2] + across[1][columns] * stretch
            rest[part] += error + away * size
        group = Coupled(
            pairs,
            cores,
            basis,
            across[0],
            (stretch, across[2]),
            mirrored=self.symmetric,
        )
        return group, rest * math.sqrt(1 + self.symmetric)


def _levels(pairs: Pairs) -> tuple[int, int]:
    return pairs.row_level, pairs.column_level


def _padded_points(tree: ClusterTree) -> Tensor:
    """[n + 1, d] in float64; the last is there again."""
    assert tree.points is not None
    points = tree.points.double()
    return torch.cat([points, points[-1:]])
