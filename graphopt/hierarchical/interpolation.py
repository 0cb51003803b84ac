"""Chebyshev interpolation of kernels on boxes, with errors known before a kernel is evaluated.

A function that is analytic and at most M in the Bernstein ellipse of parameter rho about an
interval differs from its interpolant of degree n in Chebyshev points by at most
4 M rho^-n / (rho - 1) (Trefethen, Approximation Theory and Approximation Practice, theorem 8.2).
Directions are interpolated one after the other; each multiplies the errors of the later ones by its
Lebesgue constant, at most 1 + 2 / pi * log(n + 1).

One coordinate of a point is complex at a time: w = (z - y)^2 + s^2 with s the distance in the
other coordinates. It meets the cut of the square root on the lines from z = y +- i s away from the
axis, and an ellipse that leaves these two points outside, being convex and symmetric, leaves out
the lines.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from graphopt.hierarchical.kernels import Analytic, Region

_DOUBLE = torch.float64
# Fractions of the way from the interval to the nearest singularity; and ellipses of entire kernels.
_FRACTIONS = torch.tensor([0.2, 0.4, 0.6, 0.75, 0.87, 0.95, 0.99, 1.0], dtype=_DOUBLE)
_ENTIRE = torch.logspace(0.1, 3.0, 20, dtype=_DOUBLE)
# Coordinates of nodes, and those at which polynomials are evaluated for a point, are off by at most
# this, relative to the largest coordinate.
MOVED = 16 * 2.0**-53


@dataclass(frozen=True, eq=False)
class Boxes:
    """Bounding boxes, [b, d] each, in any unit.

    Attributes:
        centre: their middles.
        half: half of their sides.
    """

    centre: Tensor
    half: Tensor

    @classmethod
    def of(cls, low: Tensor, high: Tensor, scales: Tensor) -> Boxes:
        """From corners, in units of the scales [d]."""
        return cls((low + high) / 2 / scales, (high - low) / 2 / scales)

    def __getitem__(self, index: Tensor) -> Boxes:
        return Boxes(self.centre[index], self.half[index])


def lebesgue(nodes: int) -> float:
    """An upper bound of the Lebesgue constant of so many Chebyshev points."""
    return 1 + 2 / math.pi * math.log(nodes)


@dataclass(frozen=True, eq=False)
class Decay:
    """How fast the interpolation errors of one side of blocks fall with the number of nodes.

    An error with p nodes is the least of ``exp(start - (p - 1) * rate)`` over ellipses.

    Attributes:
        start: [b, d, q] for each block, direction and ellipse.
        rate: like `start`.
    """

    start: Tensor
    rate: Tensor

    @classmethod
    def of(cls, kernel: Analytic, own: Boxes, other: Boxes) -> Decay:
        """For interpolation on boxes `own`, with points anywhere in boxes `other`."""
        away = (own.centre - other.centre).abs()
        # What rounding may have added to it, or taken from it.
        slack = 2.0**-50 * (own.centre.abs() + other.centre.abs() + own.half + other.half)
        nearest = (away - slack - other.half).clamp(min=0)
        farthest = away + slack + other.half
        gap = (nearest - own.half).clamp(min=0).square()
        reach = (farthest + own.half).square()
        aside = (gap.sum(1, keepdim=True) - gap).clamp(min=0)
        beyond = reach.sum(1, keepdim=True) - reach
        half = own.half.clamp(min=1e-150)
        if kernel.entire:
            rho = _ENTIRE.expand(*half.shape, -1)
            free = torch.zeros_like(half)
        else:
            # The sum of distances to the foci of the ellipse through the nearest singularity.
            side = aside.sqrt()
            foci = torch.hypot(nearest - half, side) + torch.hypot(nearest + half, side)
            # Rounding must not move the singularity into the ellipse.
            free = (foci / (2 * half)).clamp(max=1e100) * (1 - 1e-14)
            most = _parameter(free)
            rho = 1 + (most - 1).unsqueeze(2) * _FRACTIONS
        major, minor = (rho + 1 / rho) / 2, (rho - 1 / rho) / 2
        h, u = half.unsqueeze(2), nearest.unsqueeze(2)
        real = (u - h * major).clamp(min=0).square() - (h * minor).square() + aside.unsqueeze(2)
        high = (h * major + farthest.unsqueeze(2)).square() + beyond.unsqueeze(2)
        # The sum of focal distances grows by at most 2 per unit of length.
        low = (h * (free.unsqueeze(2) - major).clamp(min=0)).square()
        low = torch.maximum(low, real)
        bound = kernel.majorant(Region(low, high, real))
        start = (4 * bound / (rho - 1)).log()
        flat = (own.half == 0).unsqueeze(2)
        start = torch.where(flat, -torch.inf, torch.where(start.isnan(), torch.inf, start))
        return cls(start, rho.log())

    def error(self, nodes: list[int]) -> Tensor:
        """[b] upper bounds of the error with so many nodes in each direction."""
        total, factor = torch.zeros(self.start.shape[0], dtype=_DOUBLE), 1.0
        for i, count in enumerate(nodes):
            total = total + factor * self.direction(i, count)
            factor *= lebesgue(count)
        return total

    def direction(self, i: int, count: int) -> Tensor:
        """[b] upper bounds of the error of one direction."""
        return (self.start[:, i] - (count - 1) * self.rate[:, i]).amin(1).exp()


def _parameter(major: Tensor) -> Tensor:
    """Rho of the ellipse with a major half axis."""
    major = major.clamp(min=1)
    return major + ((major - 1) * (major + 1)).sqrt()


@dataclass(frozen=True, eq=False)
class Errors:
    """Of interpolation in both points of a kernel."""

    own: Decay
    other: Decay
    size: Tensor

    def bounds(self, nodes: list[int], others: list[int]) -> Tensor:
        """[b] upper bounds of the error of every entry of a block."""
        factor = math.prod(lebesgue(count) for count in nodes)
        found = self.own.error(nodes) + factor * self.other.error(others)
        factor *= math.prod(lebesgue(count) for count in others)
        return torch.minimum(found, (1 + factor) * self.size)


@dataclass(frozen=True, eq=False)
class Estimate:
    """What is known of kernels on blocks before any is evaluated.

    Attributes:
        kernel: that is interpolated.
        errors: of interpolation.
        low: [b] lower bounds of squared scaled distances.
        size: [b] upper bounds of absolute values.
        moved: how far points and nodes may be off, in units of the scale, see `shifted_by`.
    """

    kernel: Analytic
    errors: Errors
    low: Tensor
    size: Tensor
    moved: float

    @classmethod
    def of(cls, kernel: Analytic, own: Boxes, other: Boxes, moved: float) -> Estimate:
        """For boxes [b, d] of rows and of columns."""
        away, reach = (own.centre - other.centre).abs(), own.half + other.half
        low = (away - reach - moved).clamp(min=0).square().sum(1)
        size = kernel.size(low, (away + reach + moved).square().sum(1))
        decay = Decay.of(kernel, own, other), Decay.of(kernel, other, own)
        return cls(kernel, Errors(*decay, size), low, size, moved)

    def bounds(self, nodes: list[int]) -> tuple[Tensor, Tensor]:
        """[b] of the error of an entry, and of what rounding adds to it."""
        constants = [lebesgue(count) for count in nodes]
        once = math.prod(constants)
        own = self.kernel.rounding(self.size, len(nodes))
        lost = (1 + once**2) * (self.moved * self.kernel.slope(self.low) + own)
        entry, wider = self.errors.bounds(nodes, nodes), 1 + max(constants) * (1 + 1e-9)
        there, kept = (
            off * (2 * once + off) * self.size
            for off in (rounding(nodes, c) for c in (True, False))
        )
        # Nodes that are not where they should be count as rounding, or as interpolation.
        better = entry + there <= wider * entry + kept
        entry = torch.where(better, entry, wider * entry)
        return entry, lost + torch.where(better, there, kept)


def shifted_by(points: Tensor, scales: Tensor) -> float:
    """How far rounding may move points [n, d] and nodes of their boxes, in units of the scales."""
    reach = float((points / scales).abs().max())
    return MOVED * math.sqrt(points.shape[1]) * reach


def nodes_for(errors: Errors, weights: Tensor, budget: float, most: int) -> list[int] | None:
    """The fewest nodes of each direction for which the errors of blocks stay within a budget.

    Args:
        errors: of the blocks of a level.
        weights: [b] the root of the number of entries of each block.
        budget: of the Frobenius norm over all blocks.
        most: nodes of a box.

    Returns:
        The number for each direction, the same for both sides; None if `most` is not enough.
    """
    directions = errors.own.start.shape[1]
    share = budget / (2 * directions)
    nodes = [1] * directions
    for i in range(directions):
        factor = lebesgue(8) ** (directions - 1)
        while True:
            worst = torch.maximum(
                errors.own.direction(i, nodes[i]),
                factor * lebesgue(nodes[i]) * errors.other.direction(i, nodes[i]),
            )
            worst = torch.minimum(worst, 10 * errors.size)
            if float((worst * weights).square().sum()) <= share**2:
                break
            nodes[i] += 1
            if math.prod(nodes) > most:
                return None
    while float((errors.bounds(nodes, nodes) * weights).square().sum()) > budget**2:
        nodes = [count + (count > 1) for count in nodes]
        if math.prod(nodes) > most or max(nodes) == 1:
            return None
    return nodes


def chebyshev(low: Tensor, high: Tensor, nodes: list[int]) -> Tensor:
    """[c, prod(nodes), d] tensor grids of Chebyshev points in boxes of corners [c, d]."""
    unit = torch.cartesian_prod(*(_grid(count) for count in nodes)).reshape(-1, len(nodes))
    return (low + high).unsqueeze(1) / 2 + (high - low).unsqueeze(1) / 2 * unit


def lagrange(points: Tensor, low: Tensor, high: Tensor, nodes: list[int]) -> Tensor:
    """[c, m, prod(nodes)] what interpolation multiplies values at nodes with, at [c, m, d]."""
    found = torch.ones(*points.shape[:2], 1, dtype=_DOUBLE)
    half = (high - low) / 2
    place = (points - ((low + high) / 2).unsqueeze(1)) / half.clamp(min=1e-300).unsqueeze(1)
    for i, count in enumerate(nodes):
        grid = _grid(count)
        # Twice the distances, whose products neither vanish nor overflow.
        away = 2 * (place[..., i].clamp(-1, 1).unsqueeze(2) - grid)
        apart = 2 * (grid.unsqueeze(1) - grid)
        ones = torch.ones_like(away[..., :1])
        before = torch.cat([ones, away[..., :-1].cumprod(2)], 2)
        after = torch.cat([ones, away[..., 1:].flip(2).cumprod(2)], 2).flip(2)
        own = before * after / apart.fill_diagonal_(1).prod(1)
        found = (found.unsqueeze(3) * own.unsqueeze(2)).flatten(2)
    return found


def _grid(count: int) -> Tensor:
    """Chebyshev points of [-1, 1]."""
    return torch.sin(math.pi / 2 * (count - 1 - 2 * torch.arange(count, dtype=_DOUBLE)) / count)


def rounding(nodes: list[int], displaced: bool) -> float:
    """How far rounding may move an interpolated value, relative to the largest value at nodes.

    Rounding of a point's place in its box moves the point; see `MOVED`. Products of differences are
    exact up to 4 p + 4 roundings. What is wrong of p nodes themselves, 5 u of their angles and 2 u
    of their sines, moves a polynomial of that degree by at most as much times p - 1, and times
    (p - 1) / sin(angle) <= p (p - 1): Bernstein's inequality.

    Args:
        nodes: of each direction.
        displaced: that is in it; otherwise the interpolant in the nodes as they are is meant, for
            which errors are 1 + its Lebesgue constant times as large: it is that of the difference
            to the interpolant in the exact nodes, which is that small in the nodes as they are.
    """
    unit, most, exact = 2.0**-53, 1.0, 1.0
    for count in nodes:
        once = lebesgue(count)
        moved = unit * (count - 1) * (5 + 2 * count) if displaced else 0.0
        # The constant of displaced nodes is larger by their displacement.
        grown = once * (1 + 2 * unit * (count - 1) * (5 + 2 * count) * once)
        most *= grown * (1 + (4 * count + 5) * unit) + 2 * grown * moved * once
        exact *= once
    return most - exact
