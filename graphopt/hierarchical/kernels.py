"""Kernel functions of two sets of points, and what is known of them off the real axis.

A kernel is anything that maps points [..., m, d] and [..., n, d] to values [..., m, n]. Its
``parameters()``, if it has any, are differentiated. The radial kernels here also bound themselves
in the complex plane, so that interpolation errors are known without evaluating them.

With w the squared distance over the squared scale, a kernel is ``variance * profile(w)``. Square
roots are those of the plane cut along the negative axis, hence Re sqrt(w) >= 0 there.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from graphopt.errors import ArgumentError
from graphopt.hierarchical.rounding import storage

Kernel = Callable[[Tensor, Tensor], Tensor]
Hyper = float | Tensor

# Squared distances below count as no distance: their square root is still a normal number.
_TINY = 1e-300


@dataclass(frozen=True)
class Region:
    """Where squared scaled distances w of two boxes are, one of which reaches off the real axis.

    Attributes:
        low: lower bounds of abs(w).
        high: upper bounds of abs(w).
        real: lower bounds of Re w.
    """

    low: Tensor
    high: Tensor
    real: Tensor

    @property
    def root(self) -> Tensor:
        """Lower bounds of Re sqrt(w): its square is (abs(w) + Re w) / 2."""
        return ((self.low + self.real) / 2).clamp(min=0).sqrt()


class Analytic(Protocol):
    """A kernel that says how large it is in the complex plane, in units of its scale."""

    @property
    def entire(self) -> bool:
        """Whether it is analytic everywhere."""
        ...

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """[..., m, d] and [..., n, d] to [..., m, n]."""
        ...

    def scales(self, dimensions: int) -> Tensor:
        """[d] what coordinates are divided by."""
        ...

    def majorant(self, region: Region) -> Tensor:
        """Upper bounds of abs(kernel - c) for a constant c of one's choice."""
        ...

    def size(self, low: Tensor, high: Tensor) -> Tensor:
        """Upper bounds of the absolute value for real w between `low` and `high`."""
        ...

    def slope(self, low: Tensor) -> Tensor:
        """Upper bounds of the derivative by the scaled distance for real w of at least `low`."""
        ...

    def rounding(self, size: Tensor, dimensions: int) -> Tensor:
        """How far computed entries may be off, in float64, whose absolute values are `size`."""
        ...


def parameters(kernel: Kernel) -> tuple[Tensor, ...]:
    """The tensors of a kernel that require a gradient; those of a module too."""
    own: Callable[[], Iterable[Tensor]] | None = getattr(kernel, "parameters", None)
    return () if own is None else tuple(p for p in own() if p.requires_grad)


@dataclass(frozen=True, eq=False)
class Radial:
    """A kernel of the distance alone.

    Attributes:
        scale: a length, or [d] one for each coordinate; positive.
        variance: a factor.
    """

    scale: Hyper = 1.0
    variance: Hyper = 1.0
    entire: ClassVar[bool] = False

    def __post_init__(self) -> None:
        scale = torch.as_tensor(self.scale, dtype=torch.float64).detach()
        if not bool(((scale > 0) & scale.isfinite()).all()):
            raise ArgumentError(
                f"a kernel cannot have the scale {scale.tolist()}", hint="pass a positive one"
            )
        if not math.isfinite(float(torch.as_tensor(self.variance).detach())):
            raise ArgumentError("a kernel cannot have an infinite variance", hint="pass a number")

    def parameters(self) -> tuple[Tensor, ...]:
        """The hyperparameters that are tensors."""
        return tuple(p for p in (self.scale, self.variance) if isinstance(p, Tensor))

    def shaping(self) -> tuple[Tensor, ...]:
        """Those of them that change more than a factor."""
        return (self.scale,) if isinstance(self.scale, Tensor) else ()

    def profile(self, squared: Tensor) -> Tensor:
        """The values at squared scaled distances."""
        raise NotImplementedError

    def scales(self, dimensions: int) -> Tensor:
        """[d] in float64, without gradient, on the CPU as points of trees are."""
        scale = torch.as_tensor(self.scale, dtype=torch.float64, device="cpu").detach()
        if scale.dim() and scale.shape != (dimensions,):
            raise ArgumentError(
                f"the scale has {scale.numel()} entries for points of {dimensions} coordinates",
                hint="pass one length, or one for each coordinate",
            )
        return scale.expand(dimensions)

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """[..., m, d] and [..., n, d] to [..., m, n]; float64 unless both are float32."""
        self.scales(x.shape[-1])
        if not (torch.is_grad_enabled() and self._differentiable(x, y)):
            values = self.profile_(self.squared(x, y))
            return values if self.factor == 1 else values.mul_(self.factor)
        dtype = torch.promote_types(x.dtype, y.dtype)
        inverse = torch.as_tensor(self.scale, dtype=dtype, device=x.device).square().reciprocal()
        # From differences, scaled afterwards: anything else would cancel for near points.
        parts = [(x[..., :, None, i] - y[..., None, :, i]).square() for i in range(x.shape[-1])]
        if inverse.dim():
            parts = [part * inverse[i] for i, part in enumerate(parts)]
        total = functools.reduce(torch.add, parts)
        if not inverse.dim() and (isinstance(self.scale, Tensor) or self.scale != 1):
            total = total * inverse
        found = self.profile(total)
        if isinstance(self.variance, float) and self.variance == 1:
            return found
        return torch.as_tensor(self.variance, dtype=dtype, device=x.device) * found

    @torch.no_grad()
    def squared(self, x: Tensor, y: Tensor) -> Tensor:
        """[..., m, d] and [..., n, d] to [..., m, n] squared distances over squared scales."""
        dtype = torch.promote_types(x.dtype, y.dtype)
        inverse = torch.as_tensor(self.scale, dtype=dtype).detach().square().reciprocal()
        own, other = x.mT.contiguous(), y.mT.contiguous()
        total: Tensor | None = None
        for i, weight in enumerate(inverse.expand(x.shape[-1]).tolist()):
            part = own[..., i, :, None] - other[..., i, None, :]
            factor = weight if inverse.dim() else 1.0
            if total is None:
                total = part.square_().mul_(factor) if factor != 1 else part.square_()
            else:
                total.addcmul_(part, part, value=factor)
        assert total is not None
        return total if inverse.dim() else total.mul_(float(inverse))

    def profile_(self, squared: Tensor) -> Tensor:
        """`profile`, which may use the memory of its argument; not differentiable."""
        return self.profile(squared)

    @property
    def factor(self) -> float:
        """The variance."""
        return float(torch.as_tensor(self.variance, dtype=torch.float64).detach())

    def _differentiable(self, x: Tensor, y: Tensor) -> bool:
        return any(t.requires_grad for t in (x, y, *self.parameters()))

    def rounding(self, size: Tensor, dimensions: int) -> Tensor:
        """See `Analytic`: squared distances are off by (d + 7) u, roots by half of it.

        Moving r by a relative amount moves no profile by more than that amount times the variance,
        or times the value, and the last roundings are of the value.
        """
        return (dimensions + 8) * storage(torch.float64) * (size + self._factor)

    @property
    def _factor(self) -> float:
        """The absolute variance."""
        return abs(self.factor)


class Exponential(Radial):
    """exp(-r), the Matern kernel of smoothness 1/2."""

    def profile(self, squared: Tensor) -> Tensor:
        """See `Radial`."""
        return torch.exp(-_root(squared))

    def profile_(self, squared: Tensor) -> Tensor:
        """See `Radial`."""
        return _root_(squared).neg_().exp_()

    def majorant(self, region: Region) -> Tensor:
        """abs(exp(-sqrt(w))) = exp(-Re sqrt(w))."""
        return self._factor * torch.exp(-region.root)

    def size(self, low: Tensor, high: Tensor) -> Tensor:
        """See `Analytic`."""
        return self._factor * torch.exp(-low.sqrt())

    def slope(self, low: Tensor) -> Tensor:
        """See `Analytic`."""
        return self._factor * torch.exp(-low.sqrt())


class Matern32(Radial):
    """(1 + a) exp(-a) with a = sqrt(3) r."""

    def profile(self, squared: Tensor) -> Tensor:
        """See `Radial`."""
        a = math.sqrt(3) * _root(squared)
        return (1 + a) * torch.exp(-a)

    def profile_(self, squared: Tensor) -> Tensor:
        """See `Radial`."""
        a = _root_(squared).mul_(math.sqrt(3))
        return torch.exp(-a).mul_(a.add_(1))

    def majorant(self, region: Region) -> Tensor:
        """The polynomial at abs(a), the exponential at Re a."""
        a, root = math.sqrt(3) * region.high.sqrt(), math.sqrt(3) * region.root
        return self._factor * (1 + a) * torch.exp(-root)

    def size(self, low: Tensor, high: Tensor) -> Tensor:
        """See `Analytic`."""
        return self._factor * self.profile(low)

    def slope(self, low: Tensor) -> Tensor:
        """Sqrt(3) a exp(-a), which falls from a = 1 on."""
        a = (math.sqrt(3) * low.sqrt()).clamp(min=1)
        return self._factor * math.sqrt(3) * a * torch.exp(-a)


class Matern52(Radial):
    """(1 + a + a^2 / 3) exp(-a) with a = sqrt(5) r."""

    def profile(self, squared: Tensor) -> Tensor:
        """See `Radial`."""
        a = math.sqrt(5) * _root(squared)
        return (1 + a + a.square() / 3) * torch.exp(-a)

    def profile_(self, squared: Tensor) -> Tensor:
        """See `Radial`."""
        a = _root_(squared).mul_(math.sqrt(5))
        decay = torch.exp(-a)
        return decay.mul_(torch.addcmul(a, a, a, value=1 / 3).add_(1))

    def majorant(self, region: Region) -> Tensor:
        """The polynomial at abs(a), the exponential at Re a."""
        a, root = math.sqrt(5) * region.high.sqrt(), math.sqrt(5) * region.root
        return self._factor * (1 + a + a.square() / 3) * torch.exp(-root)

    def size(self, low: Tensor, high: Tensor) -> Tensor:
        """See `Analytic`."""
        return self._factor * self.profile(low)

    def slope(self, low: Tensor) -> Tensor:
        """Sqrt(5) / 3 a (1 + a) exp(-a), which falls from a = (1 + sqrt(5)) / 2 on."""
        a = (math.sqrt(5) * low.sqrt()).clamp(min=(1 + math.sqrt(5)) / 2)
        return self._factor * math.sqrt(5) / 3 * a * (1 + a) * torch.exp(-a)


class Gaussian(Radial):
    """exp(-r^2 / 2), also called RBF or squared exponential."""

    entire: ClassVar[bool] = True

    def profile(self, squared: Tensor) -> Tensor:
        """See `Radial`."""
        return torch.exp(squared / -2)

    def profile_(self, squared: Tensor) -> Tensor:
        """See `Radial`."""
        return squared.mul_(-0.5).exp_()

    def majorant(self, region: Region) -> Tensor:
        """abs(exp(-w / 2)) = exp(-Re w / 2)."""
        return self._factor * torch.exp(region.real / -2)

    def size(self, low: Tensor, high: Tensor) -> Tensor:
        """See `Analytic`."""
        return self._factor * torch.exp(low / -2)

    def slope(self, low: Tensor) -> Tensor:
        """R exp(-r^2 / 2), which falls from r = 1 on."""
        low = low.clamp(min=1)
        return self._factor * low.sqrt() * torch.exp(low / -2)


@dataclass(frozen=True, eq=False)
class Logarithm(Radial):
    """log(r), as potentials in the plane.

    Attributes:
        at_zero: the value where points coincide.
    """

    at_zero: float = 0.0

    def profile(self, squared: Tensor) -> Tensor:
        """See `Radial`."""
        found = torch.log(squared.clamp(min=_TINY)) / 2
        return torch.where(squared < _TINY, self.at_zero, found)

    def majorant(self, region: Region) -> Tensor:
        """Half of log(w / w0): the ratio of both ends, and an angle of at most pi."""
        return self._factor * ((region.high / region.low).log() + math.pi) / 2

    def size(self, low: Tensor, high: Tensor) -> Tensor:
        """See `Analytic`."""
        return self._factor * torch.maximum(low.log().abs(), high.log().abs()) / 2

    def slope(self, low: Tensor) -> Tensor:
        """1 / r."""
        return self._factor * low.rsqrt()


@dataclass(frozen=True, eq=False)
class InverseDistance(Radial):
    """1 / r, as potentials in space.

    Attributes:
        at_zero: the value where points coincide.
    """

    at_zero: float = 0.0

    def profile(self, squared: Tensor) -> Tensor:
        """See `Radial`."""
        return torch.where(squared < _TINY, self.at_zero, squared.clamp(min=_TINY).rsqrt())

    def majorant(self, region: Region) -> Tensor:
        """abs(w) ** -1/2."""
        return self._factor * region.low.rsqrt()

    def size(self, low: Tensor, high: Tensor) -> Tensor:
        """See `Analytic`."""
        return self._factor * low.rsqrt()

    def slope(self, low: Tensor) -> Tensor:
        """1 / r^2."""
        return self._factor / low

    def rounding(self, size: Tensor, dimensions: int) -> Tensor:
        """Relative to the value alone: it is a power of the distance."""
        return (dimensions + 8) * storage(torch.float64) * size


def _root(squared: Tensor) -> Tensor:
    """The square root, with gradient 0 at 0."""
    return squared.clamp(min=_TINY).sqrt()


def _root_(squared: Tensor) -> Tensor:
    """`_root` in place."""
    return squared.clamp_(min=_TINY).sqrt_()
