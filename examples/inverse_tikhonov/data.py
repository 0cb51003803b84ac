"""Pairs of a parameter and its noisy observation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from graphopt.examples.common import check_tensor
from graphopt.examples.inverse_tikhonov.model import GaussianPrior


@dataclass(frozen=True)
class Pairs:
    """Samples of one problem.

    Attributes:
        u: parameters, (samples, cells).
        y: observations, (samples, observed).
    """

    u: Tensor
    y: Tensor

    def to(self, device: torch.device, dtype: torch.dtype) -> Pairs:
        """A copy elsewhere."""
        return Pairs(self.u.to(device, dtype), self.y.to(device, dtype))

    def __getitem__(self, part: slice) -> Pairs:
        return Pairs(self.u[part], self.y[part])


def load_pairs(u: Tensor, y: Tensor) -> Pairs:
    """Check parameters (samples, cells) and their observations (samples, observed)."""
    real = (torch.float32, torch.float64)
    check_tensor("parameters", u, (None, None), real)
    return Pairs(u, check_tensor("observations", y, (len(u), None), real))


def draw_pairs(
    prior: GaussianPrior, problem: nn.Module, noise: float, count: int, generator: torch.Generator
) -> Pairs:
    """Parameters from the prior, seen through ``problem`` with white noise; float64, on the CPU.

    Args:
        prior: of the parameters.
        problem: the forward map.
        noise: standard deviation.
        count: samples.
        generator: of the randomness.
    """

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    u = prior.colour(normal(count, len(prior.mean)))
    exact = problem(u)
    return load_pairs(u, exact + noise * normal(*exact.shape))
