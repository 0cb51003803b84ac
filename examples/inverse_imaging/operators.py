"""Coded blur with missing pixels, its adjoint, and conjugate gradients on batches of pictures."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def blur(x: Tensor, transfer: Tensor) -> Tensor:
    """Circular convolution of pictures (batch, 1, height, width).

    Args:
        x: the pictures.
        transfer: Fourier transform of the kernel, complex (height, width // 2 + 1).
    """
    blurred: Tensor = torch.fft.irfft2(torch.fft.rfft2(x) * transfer, s=x.shape[-2:])
    return blurred


def observe(x: Tensor, transfer: Tensor, mask: Tensor) -> Tensor:
    """A x: blurred, then kept where ``mask`` (height, width) is 1 and zero elsewhere."""
    return mask * blur(x, transfer)


def adjoint(y: Tensor, transfer: Tensor, mask: Tensor) -> Tensor:
    """A^T y, of the size of y (batch, 1, height, width)."""
    return blur(mask * y, transfer.conj())


def conjugate_gradients(
    apply: Callable[[Tensor], Tensor], target: Tensor, start: Tensor, iterations: int
) -> Tensor:
    """Solve ``apply(x) = target`` for a symmetric positive definite ``apply``, per sample.

    Args:
        apply: linear, from and to (batch, 1, height, width).
        target: the right-hand side.
        start: a first guess.
        iterations: how many; gradients flow through all of them.
    """

    def dot(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum((1, 2, 3), keepdim=True)

    tiny = torch.finfo(target.dtype).tiny  # a solved sample has a residual of zero
    x, residual = start, target - apply(start)
    direction, size = residual, dot(residual, residual)
    for _ in range(iterations):
        applied = apply(direction)
        length = size / (dot(direction, applied) + tiny)
        x = x + length * direction
        residual = residual - length * applied
        size, before = dot(residual, residual), size
        direction = residual + size / (before + tiny) * direction
    return x
