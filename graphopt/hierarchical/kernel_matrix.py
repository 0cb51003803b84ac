"""A kernel matrix in blocks, built from the kernel function without ever forming the matrix."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from graphopt.errors import ArgumentError
from graphopt.hierarchical.admissibility import Pairs, Strong, first, refined
from graphopt.hierarchical.clusters import ClusterTree
from graphopt.hierarchical.compress import residual_bound, svd
from graphopt.hierarchical.groups import Coupled, Group, Source, Tiles
from graphopt.hierarchical.interpolation import (
    Boxes,
    Decay,
    Errors,
    chebyshev,
    lagrange,
    lebesgue,
    nodes_for,
    rounding,
)
from graphopt.hierarchical.kernels import Analytic, parameters
from graphopt.hierarchical.matrix import HMatrix
from graphopt.hierarchical.packed import Packed, sorted_by_ancestor
from graphopt.hierarchical.rounding import gamma, norms

_DOUBLE = torch.float64
# Clusters up to this size may be their own nodes; boxes have no more nodes than that.
_MOST = 1024
# Entries of kernels that are evaluated at once: they fit into a cache.
_CHUNK = 2**17
# Entries of blocks that are kept between two passes over them.
_KEPT = 2**27
# Parts of the tolerance for interpolation, and for it together with the truncation of bases.
_INTERPOLATION, _TOGETHER = 0.3, 0.9
# Random columns for the bases of clusters at first, beside those that make sure.
_SAMPLES = 48


def from_kernel(
    kernel: Analytic,
    rows: ClusterTree,
    columns: ClusterTree | None = None,
    *,
    tolerance: float = 1e-6,
    rule: Strong | None = None,
    dtype: torch.dtype = _DOUBLE,
) -> HMatrix:
    """The matrix of a kernel at the points of two trees.

    Blocks of clusters far from each other are ``left @ core @ right.T`` with bases that belong to
    the clusters. Kernels are interpolated in Chebyshev points of the bounding boxes, so many that
    an analytic bound of the error says enough; small clusters are evaluated themselves. Bases are
    cut to what the kernel needs, with residuals that are measured. Work and memory grow with the
    number of points times a power of log(1 / tolerance).

    Args:
        kernel: for instance `Matern32(scale=0.2)`; evaluated in float64.
        rows: clusters of points.
        columns: those of the other argument; None for the rows', and a symmetric matrix.
        tolerance: of the Frobenius norm of the error, relative to that of the matrix.
        rule: which clusters are far from each other.
        dtype: what values are stored in.

    Returns:
        A matrix whose products are differentiable by the kernel's parameters. Its bound is at most
        `tolerance` times its norm.

    Raises:
        ArgumentError: a tolerance below what the dtype reaches, or clusters without points.
    """
    other = rows if columns is None else columns
    if not 0 < tolerance < 1:
        raise ArgumentError(f"a tolerance of {tolerance}", hint="pass one between 0 and 1")
    if rows.points is None or other.points is None:
        raise ArgumentError("clusters by index have no points", hint="build trees by `by_points`")
    if rows.points.shape[1] != other.points.shape[1]:
        raise ArgumentError(
            f"points of {rows.points.shape[1]} and of {other.points.shape[1]} coordinates",
            hint="pass points of one space",
        )
    builder = _Builder(kernel, rows, other, columns is None, rule or Strong(), dtype)
    # Sampled, hence a guess; what counts is the comparison afterwards.
    size, best = builder.guess(), math.inf
    for _ in range(4):
        groups, error = builder.groups(tolerance * size)
        packed = Packed(groups, rows, other, parameters(kernel))
        norm = packed.norm * (1 - 1e-9) - error
        if error <= tolerance * norm:
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


@dataclass(frozen=True, eq=False)
class _Side:
    """The clusters of one level as rows or columns of blocks.

    Attributes:
        at: [c, k, d] where the kernel is evaluated.
        spread: [c, m, j] orthonormal columns; None for the identity.
        mix: [c, j, k] from values at `at` to coefficients of `spread`.
        lost: [c] bounds of what the factorisation of the interpolation lost.
        size: [c] bounds of the norm of the interpolation.
    """

    at: Tensor
    spread: Tensor | None
    mix: Tensor
    lost: Tensor
    size: Tensor


@dataclass(eq=False)
class _Basis:
    """Orthonormal columns for the clusters of a level, the most important first.

    Attributes:
        vectors: [c, j, j].
        rank: how many are used.
    """

    vectors: Tensor
    rank: int

    @classmethod
    def of(cls, samples: Tensor, budget: float, symmetric: bool) -> _Basis:
        """From [c, j, q]: so many that what is left out of all of them is within a budget.

        The budget is of both sides, and some of it is for samples being samples.
        """
        squares, vectors = torch.linalg.eigh(samples @ samples.mT)
        share = 0.5 * budget**2 / 2
        # Squares are known up to rounding relative to the largest.
        noise = 2.0**-50 * squares[:, -1:]
        if float(noise.sum()) * samples.shape[1] > 0.1 * share:
            vectors, values, _ = svd(samples)
            squares = values.square().flip(-1)
        else:
            vectors, squares = vectors.flip(-1), squares.clamp(min=0)
        left_out = squares.sum(0).cumsum(0)
        drop = min(int((left_out <= share).sum()), squares.shape[1] - 1)
        return cls(vectors, squares.shape[1] - drop)

    def columns(self) -> Tensor:
        """[c, j, r]."""
        return self.vectors[..., : self.rank].contiguous()

    def more(self) -> bool:
        """Use some more columns; whether there are any."""
        most, before = self.vectors.shape[2], self.rank
        self.rank = min(most, before + max(1, before // 6))
        return self.rank > before


class _Values:
    """The kernel at the nodes of the blocks of a level, piece by piece.

    Iterating gives slices and [b, k, l] values. Pieces are kept for the next time, as many as there
    is room for.
    """

    def __init__(self, kernel: Analytic, pairs: Pairs, sides: list[_Side]) -> None:
        self.kernel = kernel
        self.pairs = pairs
        self.sides = sides
        self._kept: dict[int, Tensor] = {}

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        own, other = self.sides
        room = _KEPT // (own.at.shape[1] * other.at.shape[1])
        for part in _chunks(len(self.pairs), own.at.shape[1] * other.at.shape[1]):
            found = self._kept.get(part.start)
            if found is None:
                rows, columns = self.pairs.rows[part], self.pairs.columns[part]
                found = self.kernel(own.at[rows], other.at[columns]).double()
                if part.stop <= room:
                    self._kept[part.start] = found
            yield part, found

    def derivatives(self, part: slice, shaping: tuple[Tensor, ...]) -> list[Tensor]:
        """[b, k, l] each, by the entries of parameters, times these: relative changes."""
        if not shaping:
            return []
        own, other = self.sides
        with torch.enable_grad():
            at = own.at[self.pairs.rows[part]], other.at[self.pairs.columns[part]]
            values = self.kernel(*at).double()
            # The derivative of a gradient by its weights is that of the values: forward mode.
            weights = torch.zeros_like(values, requires_grad=True)
            found = torch.autograd.grad(values, shaping, weights, create_graph=True)
            entries = [
                (gradient.flatten()[i], float(parameter.detach().flatten()[i]))
                for gradient, parameter in zip(found, shaping, strict=True)
                for i in range(gradient.numel())
            ]
            return [
                size * torch.autograd.grad(entry, weights, retain_graph=True)[0]
                for entry, size in entries
            ]


class _Builder:
    def __init__(
        self,
        kernel: Analytic,
        rows: ClusterTree,
        columns: ClusterTree,
        symmetric: bool,
        rule: Strong,
        dtype: torch.dtype,
    ) -> None:
        self.kernel = kernel
        self.trees = rows, columns
        self.symmetric = symmetric
        self.rule = rule
        self.dtype = dtype
        self.points = tuple(_padded_points(tree) for tree in self.trees)
        self.dimensions = self.points[0].shape[1]
        self.scales = kernel.scales(self.dimensions)
        reach = max(float((p / self.scales).abs().max()) for p in self.points)
        # Positions of points and nodes, in units of the scale, are off by at most this.
        self.moved = 8 * 2.0**-53 * math.sqrt(self.dimensions) * reach

    @torch.no_grad()
    def guess(self) -> float:
        """Of the Frobenius norm: random entries, and the diagonal."""
        generator = torch.Generator().manual_seed(0)
        m, n = (len(tree) for tree in self.trees)
        own, other = (
            self.points[i][torch.randint(0, size, (20000,), generator=generator)].unsqueeze(1)
            for i, size in enumerate((m, n))
        )
        found = self.kernel(own, other).double().square().mean() * m * n
        if self.symmetric:
            here = self.points[0][:-1].unsqueeze(1)
            found = torch.maximum(found, self.kernel(here, here).double().square().sum())
        return float(found.sqrt())

    def groups(self, budget: float) -> tuple[list[Group], float]:
        """All blocks, and a bound of the error of all of them."""
        rows, columns = self.trees
        share = budget / math.sqrt(max(1, rows.depth + columns.depth) / 2 + 1)
        groups: list[Group] = []
        squares = 0.0
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

        def source(part: slice) -> Tensor:
            rows, columns = pairs.rows[part], pairs.columns[part]
            found = self.kernel(own[rows], other[columns])
            if full:
                return found
            return found * (filled[0][rows].unsqueeze(2) * filled[1][columns].unsqueeze(1))

        values = torch.empty(len(pairs), own.shape[1], other.shape[1], dtype=self.dtype)
        squares = 0.0
        for part in _chunks(len(pairs), values[0].numel()):
            exact = source(part).double()
            values[part] = exact
            error = norms(self.kernel.rounding(exact.abs(), self.dimensions))
            if self.dtype is not _DOUBLE:
                error = error + norms(exact - values[part].double())
            squares += float(error.square().sum())
        tiles = Tiles(pairs, values, mirrored=mirrored, source=source)
        return tiles, math.sqrt(squares * (1 + mirrored))

    @torch.no_grad()
    def _far(self, pairs: Pairs, share: float) -> tuple[Coupled, float] | None:
        """The blocks of a level and a bound of their error; None if evaluating them costs too much.

        That is if kernels cannot be interpolated by few nodes on clusters that have many points.
        """
        sizes = [t.positions[lv].shape[1] for t, lv in zip(self.trees, _levels(pairs), strict=True)]
        weights = torch.full((len(pairs),), math.sqrt(math.prod(sizes) * (1 + self.symmetric)))
        weights = weights.double()
        boxes = [
            Boxes.of(*tree.boxes[level], self.scales)
            for tree, level in zip(self.trees, _levels(pairs), strict=True)
        ]
        own, other = boxes[0][pairs.rows], boxes[1][pairs.columns]
        away = (own.centre - other.centre).abs()
        reach = own.half + other.half
        low = (away - reach - self.moved).clamp(min=0).square().sum(1)
        high = (away + reach + self.moved).square().sum(1)
        size = self.kernel.size(low, high)
        direct = max(sizes) <= _MOST
        nodes = None
        if max(sizes) > 8:
            decay = Decay.of(self.kernel, own, other), Decay.of(self.kernel, other, own)
            errors = Errors(*decay, size)
            most = min(_MOST, max(sizes) - 1)
            nodes = nodes_for(errors, weights, _INTERPOLATION * share, most)
        if nodes is None and not direct:
            return None
        kernel_error = self.kernel.rounding(size, self.dimensions)
        if nodes is None:
            entry, exact = kernel_error, 0.0
        else:
            entry = errors.bounds(nodes, nodes)
            exact = float((entry * weights).square().sum().sqrt())
            once = math.prod(lebesgue(count) for count in nodes)
            entry = entry + (1 + once**2) * (self.moved * self.kernel.slope(low) + kernel_error)
            entry = entry + rounding(nodes) * (2 * once + rounding(nodes)) * size
        sides = [self._side(0, pairs.row_level, nodes)]
        sides.append(sides[0] if self.symmetric else self._side(1, pairs.column_level, nodes))
        values = _Values(self.kernel, pairs, sides)
        budget = _TOGETHER * share - exact
        bases = self._bases(values, budget)
        while True:
            group, rest = self._cores(values, bases[0].columns(), bases[-1].columns())
            if float(rest.square().sum()) <= budget**2:
                break
            grown = [basis.more() for basis in bases]
            if not any(grown):
                break
        return group, float((entry * weights + rest).square().sum().sqrt())

    def _side(self, side: int, level: int, nodes: list[int] | None) -> _Side:
        at, filled = self._at(side, level), self._filled(side, level)
        if nodes is None:
            zero = torch.zeros(at.shape[0], dtype=_DOUBLE)
            return _Side(at, None, torch.diag_embed(filled), zero, filled.sum(1).sqrt())
        low, high = self.trees[side].boxes[level]
        weights = lagrange(at, low, high, nodes) * filled.unsqueeze(2)
        spread, mix = torch.linalg.qr(weights)
        lost = residual_bound(weights, spread, mix.mT)
        return _Side(chebyshev(low, high, nodes), spread, mix, lost, norms(weights))

    def _bases(self, values: _Values, budget: float) -> list[_Basis]:
        """Orthonormal columns for the clusters of both sides, the same ones if it is symmetric.

        They span products of all blocks of a cluster with random matrices (Halko, Martinsson and
        Tropp 2011), and products of the blocks' derivatives by parameters that change their span.
        """
        sides = values.sides
        shaping = _shaping(self.kernel)
        most = max(side.mix.shape[1] for side in sides)
        count = min(most, _SAMPLES) + 8
        while True:
            found = [
                _Basis.of(sample, budget, self.symmetric)
                for sample in self._samples(values, shaping, count)
            ]
            # Far fewer are needed than were sampled, or all are there.
            if count > most or max(basis.rank for basis in found) <= count - 8:
                return found
            count = min(2 * count, most + 8)

    def _samples(self, values: _Values, shaping: tuple[Tensor, ...], count: int) -> list[Tensor]:
        """[c, j, q] sums of blocks times random matrices, of rows and of columns."""
        pairs, sides = values.pairs, values.sides
        generator = torch.Generator().manual_seed(0)
        kinds = 1 + sum(parameter.numel() for parameter in shaping)
        random, total = [], []
        for side in sides:
            shape = *side.mix.shape[:2], count
            noise = torch.randn(shape, generator=generator, dtype=_DOUBLE) / math.sqrt(count)
            random.append(side.mix.mT @ noise)
            total.append(noise.new_zeros(kinds, side.at.shape[0], side.at.shape[1], count))
        if self.symmetric:
            random[1], total[1] = random[0], total[0]
        for part, kernel in values:
            rows, columns = pairs.rows[part], pairs.columns[part]
            for kind, block in enumerate([kernel, *values.derivatives(part, shaping)]):
                total[0][kind].index_add_(0, rows, block @ random[1][columns])
                total[1][kind].index_add_(0, columns, block.mT @ random[0][rows])
        return [
            side.mix @ torch.cat(list(own), 2)
            for side, own in zip(sides[: 2 - self.symmetric], total, strict=False)
        ]

    def _cores(self, values: _Values, left: Tensor, right: Tensor) -> tuple[Coupled, Tensor]:
        """The group, and [b] bounds of the error of its blocks beside that of interpolation."""
        pairs, sides = values.pairs, values.sides
        bases, moved, stretch = [], [], []
        for side, own in zip(sides, (left, right), strict=True):
            exact = own if side.spread is None else side.spread @ own
            basis = exact.to(self.dtype)
            product = 0.0 if side.spread is None else gamma(own.shape[1] + 1, _DOUBLE)
            away = norms(exact - basis.double())
            if side.spread is not None:
                away = away + product * norms(side.spread) * norms(own)
            gram = exact.mT @ exact
            far = norms(gram - torch.eye(gram.shape[-1], dtype=_DOUBLE))
            far = far + gamma(exact.shape[1] + 1, _DOUBLE) * norms(exact).square()
            bases.append(basis)
            moved.append(away)
            stretch.append(float((1 + far).sqrt().max()) + float(away.max()))
        mixes = [own.mT @ side.mix for side, own in zip(sides, (left, right), strict=True)]
        cores = torch.empty(len(pairs), left.shape[2], right.shape[2], dtype=self.dtype)
        rest = torch.empty(len(pairs), dtype=_DOUBLE)
        lost = gamma(max(s.mix.shape[2] for s in sides) + 2, _DOUBLE)
        small = gamma(max(left.shape[2], right.shape[2]) + 2, _DOUBLE)
        mix_size = [norms(side.mix) for side in sides]
        for part, kernel in values:
            rows, columns = pairs.rows[part], pairs.columns[part]
            block = sides[0].mix[rows] @ kernel @ sides[1].mix[columns].mT
            most = norms(kernel)
            u, v = left[rows], right[columns]
            cores[part] = u.mT @ block @ v
            core = cores[part].double()
            size = norms(core)
            error = norms(block - u @ core @ v.mT)
            error = error + 2 * lost * mix_size[0][rows] * most * mix_size[1][columns]
            error = error + 2 * small * norms(u) * size * norms(v) + small * norms(block)
            error = error * stretch[0] * stretch[1]
            error = error + sides[0].lost[rows] * most * sides[1].size[columns]
            error = error + sides[0].size[rows] * most * sides[1].lost[columns]
            away = moved[0][rows] * stretch[1] + moved[1][columns] * stretch[0]
            rest[part] = error + away * size
        if self.symmetric:
            bases[1] = bases[0]
            rest = rest * math.sqrt(2)
        group = Coupled(
            pairs,
            cores,
            bases[0],
            bases[1],
            (stretch[0], stretch[1]),
            mirrored=self.symmetric,
            source=_source(self.kernel, pairs, sides, mixes),
        )
        return group, rest


def _shaping(kernel: Analytic) -> tuple[Tensor, ...]:
    """The parameters that change more than a factor, as far as the kernel says so."""
    own = getattr(kernel, "shaping", None)
    return parameters(kernel) if own is None else tuple(p for p in own() if p.requires_grad)


def _source(kernel: Analytic, pairs: Pairs, sides: list[_Side], mixes: list[Tensor]) -> Source:
    """Cores as functions of the kernel's parameters."""
    at = sides[0].at, sides[1].at

    def source(part: slice) -> Tensor:
        rows, columns = pairs.rows[part], pairs.columns[part]
        values = kernel(at[0][rows], at[1][columns])
        return mixes[0][rows] @ values @ mixes[1][columns].mT

    return source


def _levels(pairs: Pairs) -> tuple[int, int]:
    return pairs.row_level, pairs.column_level


def _chunks(count: int, size: int) -> list[slice]:
    step = max(1, _CHUNK // size)
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


def _padded_points(tree: ClusterTree) -> Tensor:
    """[n + 1, d] in float64; the last is there again."""
    assert tree.points is not None
    points = tree.points.double()
    return torch.cat([points, points[-1:]])
