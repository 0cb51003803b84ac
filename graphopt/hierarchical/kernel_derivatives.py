"""Derivatives of kernels by the logarithms of their scales: kernels themselves, with bounds.

With w the squared scaled distance, p the profile and ``fall(w) = -2 p'(w)``, the derivative by the
logarithm of one scale for all coordinates is ``w fall(w)``, that by the logarithm of the scale of
coordinate i is ``w_i fall(w)`` with w_i its part of w.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from graphopt.hierarchical.kernels import (
    Exponential,
    Gaussian,
    Kernel,
    Matern32,
    Matern52,
    Radial,
    Region,
)


@dataclass(frozen=True)
class _Form:
    """Of a profile.

    Attributes:
        fall: of w, which is above 0.
        majorant: bounds of abs(w_i fall(w)) in a region; abs(w_i) is at most its `high`.
        peak: the w at which ``w fall(w)`` is largest; it rises before and falls after.
        slope: of w, bounds of ``2 r fall + r^2 abs(d fall / d r)`` there and farther away.
    """

    fall: Callable[[Tensor], Tensor]
    majorant: Callable[[Region], Tensor]
    peak: float
    slope: Callable[[Tensor], Tensor]


def _matern32_slope(low: Tensor) -> Tensor:
    """Sqrt(3) a (2 + a) exp(-a), which falls from a = sqrt(2) on."""
    a = (3 * low).sqrt().clamp(min=math.sqrt(2))
    return math.sqrt(3) * a * (2 + a) * torch.exp(-a)


def _matern52_slope(low: Tensor) -> Tensor:
    """Sqrt(5) / 3 a (2 + 2 a + a^2) exp(-a), falling from the root of a^3 = a^2 + 2 a + 2 on."""
    a = (5 * low).sqrt().clamp(min=2.27)
    # The root is 2.2695, where it is larger than at 2.27 by less than that.
    return (1 + 1e-6) * math.sqrt(5) / 3 * a * (2 + 2 * a + a.square()) * torch.exp(-a)


_FORMS: dict[type[Radial], _Form] = {
    Exponential: _Form(
        lambda w: torch.exp(-w.sqrt()) / w.sqrt(),
        lambda region: region.high * region.low.rsqrt() * torch.exp(-region.root),
        1.0,
        lambda low: (3 + low.sqrt()) * torch.exp(-low.sqrt()),
    ),
    Matern32: _Form(
        lambda w: 3 * torch.exp(-(3 * w).sqrt()),
        lambda region: 3 * region.high * torch.exp(-math.sqrt(3) * region.root),
        4 / 3,
        _matern32_slope,
    ),
    Matern52: _Form(
        lambda w: (5 / 3) * (1 + (5 * w).sqrt()) * torch.exp(-(5 * w).sqrt()),
        lambda region: (
            (5 / 3)
            * region.high
            * (1 + (5 * region.high).sqrt())
            * torch.exp(-math.sqrt(5) * region.root)
        ),
        (1 + math.sqrt(3)) ** 2 / 5,
        _matern52_slope,
    ),
    Gaussian: _Form(
        lambda w: torch.exp(w / -2),
        lambda region: region.high * torch.exp(region.real / -2),
        2.0,
        lambda low: (
            low.clamp(min=2).sqrt() * (2 + low.clamp(min=2)) * torch.exp(low.clamp(min=2) / -2)
        ),
    ),
}


@dataclass(frozen=True, eq=False)
class ByScale:
    """The derivative of a kernel by the logarithm of a scale; `Analytic`.

    Attributes:
        kernel: one of those with a known form, see `by_scales`.
        coordinate: whose scale; None where there is one for all.
    """

    kernel: Radial
    coordinate: int | None

    @property
    def entire(self) -> bool:
        """See `Analytic`."""
        return self.kernel.entire

    @torch.no_grad()
    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """[..., m, d] and [..., n, d] to [..., m, n]; it is not differentiable."""
        squared = self.kernel.squared(x, y)
        fall = self._form.fall(squared.clamp(min=1e-300))
        if self.coordinate is None:
            return fall.mul_(squared).mul_(self.kernel.factor)
        i = self.coordinate
        scale = float(self.scales(x.shape[-1])[i])
        away = (x[..., :, None, i] - y[..., None, :, i]).div_(scale)
        return fall.mul_(away.square_()).mul_(self.kernel.factor)

    def scales(self, dimensions: int) -> Tensor:
        """See `Analytic`."""
        return self.kernel.scales(dimensions)

    def majorant(self, region: Region) -> Tensor:
        """See `Analytic`."""
        return self._size * self._form.majorant(region)

    def size(self, low: Tensor, high: Tensor) -> Tensor:
        """See `Analytic`: ``w fall(w)`` where it is largest."""
        at = torch.minimum(low.clamp(min=self._form.peak), high).clamp(min=1e-300)
        return self._size * at * self._form.fall(at) * (1 + 1e-14)

    def slope(self, low: Tensor) -> Tensor:
        """See `Analytic`."""
        return self._size * self._form.slope(low)

    def rounding(self, size: Tensor, dimensions: int) -> Tensor:
        """See `Analytic`.

        As `Radial.rounding`, which is for a factor of 1 / 2 in front of the relative error of w and
        values up to 1: here ``r^3 d fall / d r`` is at most 2.17, and w_i has an error of its own.
        """
        return 3 * self.kernel.rounding(size, dimensions)

    @property
    def _form(self) -> _Form:
        return _FORMS[type(self.kernel)]

    @property
    def _size(self) -> float:
        return abs(self.kernel.factor)


def by_scales(kernel: Kernel) -> tuple[ByScale, ...] | None:
    """One for each entry of a scale that requires a gradient; None if their form is not known.

    It is known of `Exponential`, `Matern32`, `Matern52` and `Gaussian`, of their own parameters.
    """
    if type(kernel) not in _FORMS:
        return None
    assert isinstance(kernel, Radial)
    scale, variance = kernel.scale, kernel.variance
    if isinstance(variance, Tensor) and variance.requires_grad and not kernel.factor:
        # Of nothing, nothing can be told of what a factor would do.
        return None
    if not (isinstance(scale, Tensor) and scale.requires_grad):
        return ()
    if not scale.dim():
        return (ByScale(kernel, None),)
    return tuple(ByScale(kernel, i) for i in range(len(scale)))


@dataclass(frozen=True, eq=False)
class Stored:
    """Values of blocks as functions of hyperparameters: their derivatives are kept beside them.

    Attributes:
        kernel: of the values; its hyperparameters are as they were for them.
        values: [b, ...].
        changes: like `values`, derivatives in the order of `by_scales`.
    """

    kernel: Radial
    values: Tensor
    changes: tuple[Tensor, ...]

    def __call__(self, part: slice) -> Tensor:
        """Of a slice of blocks; to first order."""
        values, (scale, variance) = self.values[part], (self.kernel.scale, self.kernel.variance)
        found = values
        if isinstance(variance, Tensor) and variance.requires_grad:
            found = found * (variance / variance.detach()).to(values)
        if isinstance(scale, Tensor):
            for change, entry in zip(self.changes, scale.flatten(), strict=False):
                found = found + change[part] * (entry / entry.detach() - 1).to(values)
        return found
