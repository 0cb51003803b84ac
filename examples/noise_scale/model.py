"""The gradient noise scale, exactly and by two batch sizes (McCandlish et al., arXiv 1812.06162).

For a loss that is a mean over examples, with g the mean gradient and Σ the covariance of the
gradients of single examples, the noise scale tr Σ / |g|² is the batch size from which on larger
batches pay off less and less.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import least_squares
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap


def mlp(width: int = 64) -> nn.Module:
    """A classifier of 8x8 digits: (examples, 64) to (examples, 10)."""
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))


@dataclass(frozen=True)
class Noise:
    """Noise of the gradient at one point of a training.

    Attributes:
        trace: tr Σ, squared gradient units.
        square: |g|².
    """

    trace: float
    square: float

    @property
    def scale(self) -> float:
        """B_simple, in examples."""
        return self.trace / self.square


def exact_noise(model: nn.Module, images: Tensor, labels: Tensor) -> Noise:
    """From the gradient of every example.

    Args:
        model: (n, 64) to (n, 10).
        images: (n, 64).
        labels: (n,), int64.
    """
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(own: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        scores = functional_call(model, own, (image[None],))
        return nn.functional.cross_entropy(scores, label[None])

    single = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, images, labels)
    flat = torch.cat([part.flatten(1) for part in single.values()], 1).double()
    return Noise(flat.var(0).sum().item(), flat.mean(0).square().sum().item())


def two_batch_noise(small: Tensor, large: Tensor, sizes: tuple[int, int]) -> Noise:
    """Unbiased estimates from gradients at two batch sizes, as any data-parallel job has them.

    E|g_B|² = |g|² + tr Σ / B holds for both sizes; the two equations give both unknowns.

    Args:
        small: squared norms of gradients of batches of the first size, (draws,).
        large: of the second size, (draws,).
        sizes: both batch sizes, in examples.
    """
    less, more = sizes
    low, high = small.mean().item(), large.mean().item()
    square = (more * high - less * low) / (more - less)
    trace = (low - high) / (1 / less - 1 / more)
    return Noise(trace, square)


@dataclass(frozen=True)
class Hyperbola:
    """Steps that a batch size needs: S = S_min (1 + B_crit / B).

    Attributes:
        fewest: S_min, steps with batches of any size.
        critical: B_crit, examples: twice the fewest steps.
        error: root mean square of log(S / fit).
    """

    fewest: float
    critical: float
    error: float

    def steps(self, batch: float) -> float:
        """Of the fit."""
        return self.fewest * (1 + self.critical / batch)


def fit_hyperbola(batches: list[int], steps: list[float]) -> Hyperbola:
    """Least squares of logarithms, so that each batch size counts alike."""
    sizes, logs = np.asarray(batches, float), np.log(np.asarray(steps, float))

    def residual(x: np.ndarray) -> np.ndarray:
        return np.asarray(x[0] + np.log1p(np.exp(x[1]) / sizes) - logs)

    found = least_squares(residual, [logs.min(), np.log(np.median(sizes))])
    error = float(np.sqrt(np.mean(residual(found.x) ** 2)))
    return Hyperbola(float(np.exp(found.x[0])), float(np.exp(found.x[1])), error)
