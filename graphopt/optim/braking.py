"""Adaptive Braking: gradients that agree with the velocity count less, opposing ones more.

Venigalla et al., arXiv 2007.01397: ``alpha = 1 - rho * cos(g, v)`` multiplies the gradient before
it enters the velocity.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Granularity = Literal["global", "tensor", "filter"]
"""Over what the cosine is taken.

``"global"`` is over all parameters that brake globally with the same strength; ``"tensor"`` over
each; ``"filter"`` over each slice of the first dimension of a tensor of two dimensions or more, and
over whole smaller ones.
"""

EPS = 1e-30  # below any product of norms that means something


def braking_factors(
    gradients: Sequence[Tensor], velocities: Sequence[Tensor], granularity: Granularity, rho: float
) -> list[Tensor]:
    """The alpha of each gradient, which broadcasts to it.

    In at least float32, and without reading anything back to the host.

    Args:
        gradients: of any shapes, on any devices.
        velocities: before the update, shaped like them.
        granularity: see `Granularity`.
        rho: strength; with 0, every factor is 1.
    """
    if not gradients:
        return []
    sums = [_sums(g, v, granularity) for g, v in zip(gradients, velocities, strict=True)]
    if granularity == "global":
        home = gradients[0].device
        total = torch.stack([s.to(home, torch.float64) for s in sums]).sum(0)
        sums = [total] * len(sums)
    factors = []
    for gradient, (inner, gradient_square, velocity_square) in zip(gradients, sums, strict=True):
        # Roots before the product, which may underflow.
        norms = gradient_square.sqrt() * velocity_square.sqrt()
        alpha = 1 - rho * (inner / norms.clamp(min=EPS))
        factors.append(alpha.to(gradient.device, gradient.dtype))
    return factors


def _sums(gradient: Tensor, velocity: Tensor, granularity: Granularity) -> Tensor:
    """``<g, v>``, ``<g, g>`` and ``<v, v>`` along the first dimension; [3] or [3, n, 1, ...]."""
    dtype = torch.promote_types(gradient.dtype, torch.float32)
    g, v = gradient.to(dtype), velocity.to(dtype)
    if granularity == "filter" and g.dim() > 1:
        inside = tuple(range(1, g.dim()))
        return torch.stack([(p * q).sum(inside, keepdim=True) for p, q in ((g, v), (g, g), (v, v))])
    g, v = g.reshape(-1), v.reshape(-1)
    return torch.stack([g.dot(v), g.dot(g), v.dot(v)])
