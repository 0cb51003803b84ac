"""The textbook Kalman filter with dense matrices, in NumPy: what the recursion is held against."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from graphopt.examples.data_assimilation.model import (
    INITIAL_VARIANCE,
    VIRTUAL_PRIOR_PRECISION,
    DeepBayesianFilter,
)

Array = NDArray[np.float64]


@dataclass(frozen=True)
class LinearSystem:
    """h' = A h + N(0, Q), o = H h + N(0, R), with h ~ N(0, P) at first."""

    a: Array
    q: Array
    h: Array
    r: Array
    p: Array

    def simulate(self, times: int, random: np.random.Generator) -> Array:
        """Observations of shape (times, len(R))."""
        state = random.multivariate_normal(np.zeros(len(self.p)), self.p)
        seen = []
        for _ in range(times):
            seen.append(random.multivariate_normal(self.h @ state, self.r))
            state = random.multivariate_normal(self.a @ state, self.q)
        return np.stack(seen)

    def filter(self, observations: Array) -> tuple[Array, Array]:
        """Means (T, n) and covariances (T, n, n) after each observation."""
        mean, covariance = np.zeros(len(self.p)), self.p
        means, covariances = [], []
        for seen in observations:
            innovation = self.h @ covariance @ self.h.T + self.r
            gain = np.linalg.solve(innovation, self.h @ covariance).T
            mean = mean + gain @ (seen - self.h @ mean)
            kept = np.eye(len(mean)) - gain @ self.h
            covariance = kept @ covariance @ kept.T + gain @ self.r @ gain.T
            means.append(mean)
            covariances.append(covariance)
            mean, covariance = self.a @ mean, self.a @ covariance @ self.a.T + self.q
        return np.stack(means), np.stack(covariances)


def linear_gaussian(planes: int, seed: int) -> tuple[LinearSystem, DeepBayesianFilter]:
    """A linear system, and the filter whose networks are its exact inverse observation operator.

    H is dense and R correlated, but HᵀR⁻¹H = diag(w), which is what a diagonal G can express:
    G̃ = HᵀR⁻¹H + V⁻¹ and G̃ f = HᵀR⁻¹ o.
    """
    random = np.random.default_rng(seed)
    size, seen = 2 * planes, 2 * planes + 3
    root = np.tril(random.normal(size=(seen, seen)), -1) + np.diag(random.uniform(1, 2, seen))
    basis, _ = np.linalg.qr(random.normal(size=(seen, size)))
    w = random.uniform(0.05, 5, size)
    h, r = root @ basis * np.sqrt(w), root @ root.T
    inverse = (np.sqrt(w)[:, None] * basis.T) @ np.linalg.inv(root)  # HᵀR⁻¹

    model = DeepBayesianFilter(seen, 1, planes=planes, log_noise=-0.5)
    angle, growth = random.uniform(0, 3, planes), random.uniform(-0.3, 0.02, planes)
    a = np.zeros((size, size))
    for k in range(planes):
        cos, sin = np.exp(growth[k]) * np.array([np.cos(angle[k]), np.sin(angle[k])])
        a[np.ix_([k, planes + k], [k, planes + k])] = [[cos, -sin], [sin, cos]]
    center, log_precision = (nn.Linear(seen, size, dtype=torch.float64) for _ in range(2))
    with torch.no_grad():
        model.recursion.angle.copy_(torch.from_numpy(angle))
        model.recursion.growth.copy_(torch.from_numpy(growth))
        center.weight.copy_(torch.from_numpy(inverse / (w + VIRTUAL_PRIOR_PRECISION)[:, None]))
        center.bias.zero_()
        log_precision.weight.zero_()
        log_precision.bias.copy_(torch.from_numpy(np.log(w)))
    model.evidence.center = nn.Sequential(center)
    model.evidence.log_precision = nn.Sequential(log_precision)
    eye = np.eye(size)
    return LinearSystem(
        a, model.recursion.noise_variance * eye, h, r, INITIAL_VARIANCE * eye
    ), model


def largest_difference(planes: int, times: int, seed: int) -> float:
    """Between the recursion and the Kalman filter, over all means and covariances."""
    system, model = linear_gaussian(planes, seed)
    observations = system.simulate(times, np.random.default_rng(seed + 1))
    means, covariances = system.filter(observations)
    with torch.no_grad():
        after, _ = model.filter(torch.from_numpy(observations)[None])
    mean = after.mean[:, 0].transpose(0, 1).flatten(1).numpy()  # (T, 2 K)
    dense = np.zeros_like(covariances)
    for k in range(planes):
        place = np.ix_(range(times), [k, planes + k], [k, planes + k])
        dense[place] = after.covariance[:, :, 0, :, k].permute(2, 0, 1).numpy()
    return float(max(np.abs(mean - means).max(), np.abs(dense - covariances).max()))
