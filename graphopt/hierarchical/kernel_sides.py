"""The clusters of one level as rows or columns of kernel blocks, and the bases that they get."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from graphopt.hierarchical.admissibility import Pairs
from graphopt.hierarchical.compress import residual_bound, svd
from graphopt.hierarchical.groups import Source
from graphopt.hierarchical.interpolation import chebyshev, lagrange
from graphopt.hierarchical.kernels import Kernel, parameters
from graphopt.hierarchical.rounding import gamma, norms

_DOUBLE = torch.float64
# Entries of kernels that are evaluated at once: they fit into a cache.
_CHUNK = 2**17
# Entries of blocks that are kept between two passes over them.
_KEPT = 2**26


@dataclass(frozen=True, eq=False)
class Side:
    """Where kernels are evaluated for clusters, and how their points follow from that.

    Attributes:
        at: [c, k, d] nodes, or the points of the clusters.
        filled: [c, m] 1.0 where a cluster has a point, else 0.0.
        spread: [c, m, j] orthonormal columns; None where points are evaluated themselves.
        mix: [c, j, k] from values at nodes to coefficients of `spread`; None with it.
        lost: [c] bounds of what the factorisation of the interpolation lost.
        size: [c] bounds of the norm of the interpolation.
        stretch: a bound of the spectral norms of `spread`.
    """

    at: Tensor
    filled: Tensor
    spread: Tensor | None
    mix: Tensor | None
    lost: Tensor
    size: Tensor
    stretch: float

    @classmethod
    def direct(cls, points: Tensor, filled: Tensor) -> Side:
        """Of points [c, m, d] themselves."""
        zero = torch.zeros(points.shape[0], dtype=_DOUBLE)
        return cls(points, filled, None, None, zero, zero, 1.0)

    @classmethod
    def interpolated(
        cls, points: Tensor, filled: Tensor, low: Tensor, high: Tensor, nodes: list[int]
    ) -> Side:
        """Of Chebyshev points in boxes of corners [c, d]."""
        weights = lagrange(points, low, high, nodes) * filled.unsqueeze(2)
        spread, mix = torch.linalg.qr(weights)
        lost = residual_bound(weights, spread, mix.mT)
        at, size = chebyshev(low, high, nodes), norms(weights)
        return cls(at, filled, spread, mix, lost, size, _stretch(spread))

    @property
    def coefficients(self) -> int:
        """How many each cluster has."""
        return self.filled.shape[1] if self.mix is None else self.mix.shape[1]

    @property
    def mixing(self) -> Tensor:
        """[c] bounds of the norms of `mix`; 0 where nothing is multiplied."""
        return self.size if self.mix is None else norms(self.mix)

    def mixed(self, values: Tensor, clusters: Tensor | slice = slice(None)) -> Tensor:
        """[b, k, q] values at nodes of clusters to [b, j, q] coefficients."""
        if self.mix is None:
            return values * self.filled[clusters].unsqueeze(2)
        return self.mix[clusters] @ values

    def unmixed(self, coefficients: Tensor) -> Tensor:
        """The transpose of `mixed`, for all clusters."""
        if self.mix is None:
            return coefficients * self.filled.unsqueeze(2)
        return self.mix.mT @ coefficients

    def basis(self, columns: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, float]:
        """Columns [c, j, r] at the points of clusters, as they are stored.

        Returns:
            ``(basis [c, m, r], moved [c], stretch)``: how far the basis is from the exact product,
            and a bound of its spectral norms.
        """
        exact = columns if self.spread is None else self.spread @ columns
        basis = exact.to(dtype)
        moved = norms(exact - basis.double())
        if self.spread is not None:
            lost = gamma(columns.shape[1] + 1, _DOUBLE)
            moved = moved + lost * norms(self.spread) * norms(columns)
        return basis, moved, _stretch(exact) + float(moved.max())


@dataclass(eq=False)
class Basis:
    """Orthonormal columns for the clusters of a level, the most important first.

    Attributes:
        vectors: [c, j, k].
        rank: how many are used.
    """

    vectors: Tensor
    rank: int

    @classmethod
    def of(cls, samples: Tensor, budget: float) -> Basis:
        """From [c, j, q]: so many that what is left out of all of them is within a budget.

        The budget is of two sides, and half of it is left, since samples are only samples.
        """
        share = budget**2 / 4
        outer = None
        if samples.shape[1] > samples.shape[2]:
            outer, samples = torch.linalg.qr(samples)
        squares, vectors = torch.linalg.eigh(samples @ samples.mT)
        # Squares are known up to rounding relative to the largest.
        noise = 2.0**-50 * squares[:, -1:].clamp(min=0)
        if float(noise.sum()) * samples.shape[1] > 0.1 * share:
            vectors, values, _ = svd(samples)
            squares = values.square().flip(-1)
        else:
            vectors, squares = vectors.flip(-1), squares.clamp(min=0)
        left_out = squares.sum(0).cumsum(0)
        drop = min(int((left_out <= share).sum()), squares.shape[1] - 1)
        return cls(vectors if outer is None else outer @ vectors, squares.shape[1] - drop)

    def columns(self) -> Tensor:
        """[c, j, r]."""
        return self.vectors[..., : self.rank].contiguous()

    def more(self) -> bool:
        """Use some more columns; whether there are any."""
        most, before = self.vectors.shape[2], self.rank
        self.rank = min(most, before + max(1, before // 6))
        return self.rank > before


class Values:
    """The kernel at the nodes of the blocks of a level, piece by piece.

    Iterating gives slices and [b, k, l] values. Pieces are kept for the next time, as many as there
    is room for.
    """

    def __init__(
        self, kernel: Kernel, pairs: Pairs, sides: tuple[Side, Side], keep: bool = True
    ) -> None:
        self.kernel = kernel
        self.pairs = pairs
        self.sides = sides
        self._keep = _KEPT if keep else 0
        self._kept: dict[int, Tensor] = {}

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        own, other = self.sides
        size = own.at.shape[1] * other.at.shape[1]
        for part in chunks(len(self.pairs), size):
            found = self._kept.get(part.start)
            if found is None:
                found = self.evaluated(self.kernel, part)
                if part.stop * size <= self._keep:
                    self._kept[part.start] = found
            yield part, found

    def evaluated(self, kernel: Kernel, part: slice) -> Tensor:
        """[b, k, l] the values of this or another kernel."""
        return kernel(*self._nodes(part)).double()

    def _nodes(self, part: slice) -> tuple[Tensor, Tensor]:
        return (
            self.sides[0].at[self.pairs.rows[part]],
            self.sides[1].at[self.pairs.columns[part]],
        )

    def coefficients(self, part: slice, values: Tensor) -> Tensor:
        """[b, j, j] of the bases `spread` on both sides."""
        own = self.sides[0].mixed(values, self.pairs.rows[part])
        return self.sides[1].mixed(own.mT, self.pairs.columns[part]).mT

    def derivatives(self, part: slice, shaping: tuple[Tensor, ...]) -> list[Tensor]:
        """[b, k, l] each, by the entries of parameters, times these: relative changes."""
        if not shaping:
            return []
        with torch.enable_grad():
            values = self.kernel(*self._nodes(part)).double()
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

    def source(self, bases: tuple[Basis, Basis], samples: list[Tensor]) -> tuple[Source, int]:
        """Cores as functions of the kernel's parameters, and how many values one of them takes.

        Args:
            bases: of both sides.
            samples: [c, k, q] for each side whose basis is another one.
        """
        kernel = self.kernel
        rows, columns = self.pairs.rows, self.pairs.columns
        first, at = _skeleton(self.sides[0], bases[0], samples[0])
        second, other = first, at
        if bases[1] is not bases[0]:
            second, other = _skeleton(self.sides[1], bases[1], samples[1])

        def values(part: slice) -> Tensor:
            inner = kernel(at[rows[part]], other[columns[part]]).double()
            return first[rows[part]] @ inner @ second[columns[part]].mT

        return values, at.shape[1] * other.shape[1]


def _skeleton(side: Side, basis: Basis, samples: Tensor) -> tuple[Tensor, Tensor]:
    """[c, r, s] from values at a few nodes to coefficients of the basis, and nodes [c, s, d].

    Values at all nodes follow from those at a few of them: rows that Gaussian elimination takes
    as pivots in an orthonormal basis of samples of the values. To the tolerance of the bases, which
    is for derivatives alone; what is stored is computed from all nodes.
    """
    columns = side.unmixed(basis.columns()).mT
    count = min(basis.rank * 3 // 2 + 8, samples.shape[2])
    if count >= samples.shape[1]:
        return columns, side.at
    outer, inner = torch.linalg.qr(samples)
    spread = outer @ svd(inner)[0][..., :count]
    order = torch.lu_unpack(*torch.linalg.lu_factor(spread))[0].argmax(1)[:, :count]
    chosen = spread.gather(1, order.unsqueeze(2).expand(-1, -1, count))
    weights = torch.linalg.solve(chosen.mT, (columns @ spread).mT).mT
    at = side.at.gather(1, order.unsqueeze(2).expand(-1, -1, side.at.shape[2]))
    return weights, at


def shaping(kernel: Kernel) -> tuple[Tensor, ...]:
    """The parameters that change more than a factor, as far as the kernel says so."""
    own = getattr(kernel, "shaping", None)
    return parameters(kernel) if own is None else tuple(p for p in own() if p.requires_grad)


def _stretch(columns: Tensor) -> float:
    """A bound of the spectral norms of [c, m, r], whose columns are nearly orthonormal."""
    far = norms(columns.mT @ columns - torch.eye(columns.shape[2], dtype=_DOUBLE))
    far = far + gamma(columns.shape[1] + 1, _DOUBLE) * norms(columns).square()
    return math.sqrt(1 + float(far.max()))


def chunks(count: int, size: int) -> list[slice]:
    """Slices of blocks of so many entries that fit into a cache."""
    step = max(1, _CHUNK // size)
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]
