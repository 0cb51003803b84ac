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
    places: dict[torch.device, list[int]] = {}
    for index, gradient in enumerate(gradients):
        places.setdefault(gradient.device, []).append(index)
    # One tensor [3, all slices] per device: the rest is a few operators for all of them.
    sums = {
        device: torch.cat([_sums(gradients[i], velocities[i], granularity) for i in chosen], 1)
        for device, chosen in places.items()
    }
    if granularity == "global" and sums:
        home = gradients[0].device
        total = torch.stack([s.sum(1, dtype=torch.float64).to(home) for s in sums.values()]).sum(0)
        sums = {device: total.to(device)[:, None].expand_as(own) for device, own in sums.items()}
    factors: dict[int, Tensor] = {}
    for device, (inner, gradient_square, velocity_square) in sums.items():
        # Roots before the product, which may underflow.
        norms = gradient_square.sqrt() * velocity_square.sqrt()
        alphas = 1 - rho * (inner / norms.clamp(min=EPS))
        counts = [_slices(gradients[i], granularity) for i in places[device]]
        for index, alpha in zip(places[device], alphas.split(counts), strict=True):
            gradient = gradients[index]
            shape = [-1] + [1] * (gradient.dim() - 1) if gradient.dim() else []
            factors[index] = alpha.to(gradient.dtype).view(shape)
    return [factors[index] for index in range(len(gradients))]


def _slices(gradient: Tensor, granularity: Granularity) -> int:
    return gradient.shape[0] if granularity == "filter" and gradient.dim() > 1 else 1


def _sums(gradient: Tensor, velocity: Tensor, granularity: Granularity) -> Tensor:
    """``<g, v>``, ``<g, g>`` and ``<v, v>`` of each slice: [3, slices]."""
    dtype = torch.promote_types(gradient.dtype, torch.float32)
    g, v = gradient.to(dtype), velocity.to(dtype)
    if granularity == "filter" and g.dim() > 1:
        g, v = g.flatten(1), v.flatten(1)
        return torch.stack([(g * v).sum(1), g.square().sum(1), v.square().sum(1)])
    g, v = g.reshape(-1), v.reshape(-1)
    return torch.stack([g.dot(v), g.dot(g), v.dot(v)])[:, None]
