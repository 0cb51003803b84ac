"""Filters that know the equations of the system: ensemble Kalman and particle filters."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from graphopt.examples.data_assimilation.data import System, Trajectories


@dataclass(frozen=True)
class EnsembleSettings:
    """What an ensemble Kalman filter is tuned by.

    Attributes:
        members: of the ensemble.
        inflation: anomalies of the forecast are multiplied by it.
        jitter: standard deviation of noise added to members per step, in units of the scale.
        perturbed: whether observations are perturbed (stochastic EnKF) or anomalies are transformed
            (square-root filter, one scalar observation after another).
    """

    members: int
    inflation: float
    jitter: float
    perturbed: bool


def ensemble_grid(members: tuple[int, ...]) -> Iterator[EnsembleSettings]:
    """The settings that are tried on validation data."""
    for values in itertools.product(members, (1.0, 1.02, 1.05), (0.0, 0.01, 0.03), (True, False)):
        yield EnsembleSettings(*values)


def ensemble_kalman(
    system: System,
    observations: Tensor,
    settings: EnsembleSettings,
    generator: torch.Generator,
    forecast: int = 0,
) -> Tensor:
    """Means of an ensemble Kalman filter that knows the system and how trajectories begin.

    Args:
        system: what is observed.
        observations: of shape (B, T, p).
        settings: of the filter.
        generator: of the ensemble and its perturbations.
        forecast: further time steps without observations.

    Returns:
        Mean states of shape (B, T + forecast, d), in units of the scale.
    """
    batch, times, seen = observations.shape
    count = settings.members
    members = system.start(batch * count, generator).reshape(batch, count, -1)
    means = []
    for time in range(times + forecast):
        if time:
            members = system.advance(members) + settings.jitter * system.scale * _normal(
                members, generator
            )
        if time < times:
            members = _inflated(members, settings.inflation)
            for part in range(seen):
                target = observations[:, time, part, None]
                predicted = system.observe(members)[..., part]
                if settings.perturbed:
                    error = system.noise * _normal(predicted, generator)
                    members = _stochastic(members, predicted, target + error, system.noise)
                else:
                    members = _square_root(members, predicted, target, system.noise)
        means.append(members.mean(1))
    return torch.stack(means, 1) / system.scale


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=like.dtype)


def _inflated(members: Tensor, factor: float) -> Tensor:
    mean = members.mean(1, keepdim=True)
    return mean + factor * (members - mean)


def _gain(members: Tensor, predicted: Tensor, noise: float) -> tuple[Tensor, Tensor]:
    """Gain of one scalar observation (B, d), and its predicted variance (B, 1)."""
    spread = predicted - predicted.mean(1, keepdim=True)
    anomalies = members - members.mean(1, keepdim=True)
    variance = spread.square().sum(1, keepdim=True) / (members.shape[1] - 1)
    covariance = (anomalies * spread.unsqueeze(-1)).sum(1) / (members.shape[1] - 1)
    return covariance / (variance + noise**2), variance


def _stochastic(members: Tensor, predicted: Tensor, targets: Tensor, noise: float) -> Tensor:
    """Each member is moved towards its own perturbed observation."""
    gain, _ = _gain(members, predicted, noise)
    return members + gain.unsqueeze(1) * (targets - predicted).unsqueeze(-1)


def _square_root(members: Tensor, predicted: Tensor, target: Tensor, noise: float) -> Tensor:
    """The mean moves; anomalies shrink to the posterior spread (Whitaker and Hamill 2002)."""
    gain, variance = _gain(members, predicted, noise)
    mean, center = members.mean(1, keepdim=True), predicted.mean(1, keepdim=True)
    reduced = 1 / (1 + (noise**2 / (variance + noise**2)).sqrt())
    moved = mean + (gain * (target - center)).unsqueeze(1)
    spread = (predicted - center).unsqueeze(-1)
    return moved + (members - mean) - reduced.unsqueeze(-1) * gain.unsqueeze(1) * spread


def particle_filter(
    system: System,
    observations: Tensor,
    particles: int,
    jitter: float,
    generator: torch.Generator,
    forecast: int = 0,
) -> Tensor:
    """Means of a bootstrap particle filter, resampled systematically at every step.

    Args:
        system: what is observed.
        observations: of shape (B, T, p).
        particles: per trajectory.
        jitter: standard deviation of noise added per step, in units of the scale; without it,
            copies of a particle stay copies, since the dynamics have no noise.
        generator: of the particles.
        forecast: further time steps without observations.

    Returns:
        Mean states of shape (B, T + forecast, d), in units of the scale.
    """
    batch, times, _ = observations.shape
    state = system.start(batch * particles, generator).reshape(batch, particles, -1)
    means = []
    for time in range(times + forecast):
        if time:
            state = system.advance(state)
        if time >= times:
            means.append(state.mean(1))
            continue
        error = (observations[:, time, None] - system.observe(state)) / system.noise
        weights = torch.softmax(-0.5 * error.square().sum(-1), 1)
        means.append((weights.unsqueeze(-1) * state).sum(1))
        offset = torch.rand(batch, 1, generator=generator, dtype=state.dtype)
        points = (torch.arange(particles, dtype=state.dtype) + offset) / particles
        chosen = torch.searchsorted(weights.cumsum(1), points).clamp(max=particles - 1)
        state = state.gather(1, chosen.unsqueeze(-1).expand_as(state))
        state = state + jitter * system.scale * _normal(state, generator)
    return torch.stack(means, 1) / system.scale


def rmse(estimates: Tensor, states: Tensor, start: int = 0) -> float:
    """Root mean squared error from time step ``start`` on, in units of the scale."""
    return math.sqrt(float((estimates - states)[:, start:].square().mean()))


def tuned_ensemble(
    system: System, data: Trajectories, members: tuple[int, ...], seed: int
) -> dict[str, Any]:
    """The settings with the smallest error in the second half of validation trajectories."""
    half = data.observations.shape[1] // 2
    scores = {}
    for settings in ensemble_grid(members):
        generator = torch.Generator().manual_seed(seed)
        estimates = ensemble_kalman(system, data.observations, settings, generator)
        scores[settings] = rmse(estimates, data.states, half)
    best = min(scores, key=lambda s: scores[s] if math.isfinite(scores[s]) else math.inf)
    return asdict(best)


def tuned_jitter(system: System, data: Trajectories, particles: int, seed: int) -> float:
    """The particle filter's jitter with the smallest error on validation trajectories."""
    half = data.observations.shape[1] // 2
    scores = {}
    for jitter in (0.003, 0.01, 0.03):
        generator = torch.Generator().manual_seed(seed)
        estimates = particle_filter(system, data.observations, particles, jitter, generator)
        scores[jitter] = rmse(estimates, data.states, half)
    return min(scores, key=lambda jitter: scores[jitter])
