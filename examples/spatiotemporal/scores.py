"""Predictive distributions: quantiles of mixtures, interval score, coverage."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

LEVEL = 0.95


@dataclass(frozen=True)
class Prediction:
    """For each sample a mean and the interval that holds 95 % of its values, (n,) each."""

    mean: Tensor
    lower: Tensor
    upper: Tensor


@dataclass(frozen=True)
class Scores:
    """Of a prediction: root mean squared error, mean interval score, share inside the interval."""

    rmse: float
    mis: float
    coverage: float


def predict_mixture(means: Tensor, sds: Tensor) -> Prediction:
    """From an equal mixture of normal distributions.

    Args:
        means: (components, n).
        sds: (components,).
    """
    tail = (1 - LEVEL) / 2
    lower, upper = (mixture_quantile(means, sds, p) for p in (tail, 1 - tail))
    return Prediction(means.mean(0), lower, upper)


def mixture_quantile(means: Tensor, sds: Tensor, probability: float) -> Tensor:
    """Where the distribution function of an equal mixture of normals reaches ``probability``.

    By bisection between the smallest and the largest quantile of a component, in float64; the
    mixture's lies between them.

    Args:
        means: (components, n).
        sds: (components,).
        probability: within (0, 1).
    """
    means, sds = means.double(), sds.double()[:, None]
    own = means + sds * math.sqrt(2) * torch.erfinv(means.new_tensor(2 * probability - 1))
    low, high = own.amin(0), own.amax(0)
    for _ in range(60):
        middle = (low + high) / 2
        below = torch.special.ndtr((middle - means) / sds).mean(0) < probability
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


def score(prediction: Prediction, values: Tensor) -> Scores:
    """Score against the true values (n,)."""
    y = values.double()
    lower, upper = prediction.lower.double(), prediction.upper.double()
    missed = (lower - y).clamp(min=0) + (y - upper).clamp(min=0)
    interval = upper - lower + 2 / (1 - LEVEL) * missed
    return Scores(
        rmse=float((prediction.mean.double() - y).square().mean().sqrt()),
        mis=float(interval.mean()),
        coverage=float((missed == 0).double().mean()),
    )
