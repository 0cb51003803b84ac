"""Reconstruction where the forward model enters at test time only: smoothing, and plug-and-play."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphopt.examples.inverse_imaging.operators import adjoint, conjugate_gradients, observe


def smoothed(y: Tensor, transfer: Tensor, mask: Tensor, weight: float) -> Tensor:
    """The minimiser of ||Ax - y||^2 + weight ||grad x||^2."""

    def normal(x: Tensor) -> Tensor:
        rough = 4 * x
        for axis in (2, 3):
            rough = rough - x.roll(1, axis) - x.roll(-1, axis)
        return adjoint(observe(x, transfer, mask), transfer, mask) + weight * rough

    back = adjoint(y, transfer, mask)
    return conjugate_gradients(normal, back, back, 100)


@torch.no_grad()
def plug_and_play(
    y: Tensor,
    transfer: Tensor,
    mask: Tensor,
    denoiser: nn.Module,
    weight: float,
    iterations: int = 30,
    start: Tensor | None = None,
) -> Tensor:
    """ADMM in which a denoiser stands for the proximal map of the prior.

    Args:
        y: observations (batch, 1, height, width).
        transfer: of the blur, see `operators.blur`.
        mask: of the observed pixels.
        denoiser: a network for white noise of one strength.
        weight: rho, of the coupling.
        iterations: of ADMM.
        start: a first guess; A^T y without one.
    """

    def normal(x: Tensor) -> Tensor:
        return adjoint(observe(x, transfer, mask), transfer, mask) + weight * x

    back = adjoint(y, transfer, mask)
    x = z = back if start is None else start
    dual = torch.zeros_like(back)
    for _ in range(iterations):
        x = conjugate_gradients(normal, back + weight * (z - dual), x, 10)
        z = denoiser(x + dual)
        dual = dual + x - z
    return z.clamp(0, 1)


def psnr(found: Tensor, x: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, per picture (batch,), for a peak of 1."""
    return -10 * F.mse_loss(found.clamp(0, 1), x, reduction="none").mean((1, 2, 3)).log10()
