"""Pairs (signal, blurred and noisy observation) on a circle of 128 points.

A signal is a sine and a box with random position, width and height. The operator T convolves with a
two-sided exponential; no estimator but the oracle is told so.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from graphopt.examples.common import check_count, check_tensor

POINTS = 128
NOISE = 0.1  # standard deviation
SCALE = 0.03  # of the exponential, in circumferences


class Pairs(NamedTuple):
    """What an estimator learns from.

    Attributes:
        observed: T f + noise, shape [count, 1, POINTS].
        signal: f, of the same shape.
    """

    observed: Tensor
    signal: Tensor


def checked(name: str, pairs: Pairs) -> Pairs:
    """Return the pairs if they can be learnt from.

    Raises:
        WorkloadError: one is empty, of another shape or not finite, or they differ in number.
    """
    count = len(check_tensor(f"observed {name}", pairs.observed, (None, 1, POINTS)))
    check_tensor(f"signals of {name}", pairs.signal, (count, 1, POINTS))
    return pairs


def signals(count: int, generator: torch.Generator) -> Tensor:
    """Draw f, shape [count, 1, POINTS]."""
    u = torch.rand(7, count, 1, 1, generator=generator)
    x = torch.arange(POINTS) / POINTS
    width, height = 0.1 + 0.4 * u[0], (0.5 + u[1]) * torch.where(u[2] < 0.5, -1.0, 1.0)
    box = height * (torch.remainder(x - u[3], 1.0) < width)
    frequency = 1 + (3 * u[4]).floor()  # 1, 2 or 3
    wave: Tensor = (0.2 + 0.6 * u[5]) * torch.sin(2 * math.pi * (frequency * x + u[6]))
    return box + wave


def transfer() -> Tensor:
    """The Fourier coefficients of T's kernel, shape [POINTS // 2 + 1]; real, since it is even."""
    x = torch.arange(POINTS, dtype=torch.float64) / POINTS
    kernel = torch.exp(-torch.minimum(x, 1 - x) / SCALE)
    spectrum: Tensor = torch.fft.rfft(kernel / kernel.sum())
    return spectrum.real


def blur(signal: Tensor) -> Tensor:
    """T f, in the shape of f."""
    spectrum = torch.fft.rfft(signal.double()) * transfer()
    blurred: Tensor = torch.fft.irfft(spectrum, n=POINTS)
    return blurred.to(signal)


def draw(name: str, count: int, generator: torch.Generator) -> Pairs:
    """Draw signals and their observations."""
    check_count(name, count)
    signal = signals(count, generator)
    noise = NOISE * torch.randn(signal.shape, generator=generator)
    return checked(name, Pairs(blur(signal) + noise, signal))
