"""Trajectories of two nonlinear systems with noisy, ambiguous observations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from graphopt.examples.common import check_count, check_tensor

Dynamics = Callable[[Tensor], Tensor]
GRAVITY_OVER_LENGTH = 9.8  # 1/s²
FORCING = 8.0


def pendulum(state: Tensor) -> Tensor:
    """Time derivative of (θ, ω), rad and rad/s: θ¨ = -9.8 sin θ."""
    return torch.stack([state[..., 1], -GRAVITY_OVER_LENGTH * state[..., 0].sin()], -1)


def lorenz96(state: Tensor) -> Tensor:
    """Time derivative of a ring of cells: ẋᵢ = (xᵢ₊₁ - xᵢ₋₂) xᵢ₋₁ - xᵢ + F."""
    ahead, behind, two_behind = state.roll(-1, -1), state.roll(1, -1), state.roll(2, -1)
    return (ahead - two_behind) * behind - state + FORCING


def runge_kutta(dynamics: Dynamics, state: Tensor, seconds: float, steps: int) -> Tensor:
    """The state some time later, by the classical method of fourth order."""
    h = seconds / steps
    for _ in range(steps):
        a = dynamics(state)
        b = dynamics(state + 0.5 * h * a)
        c = dynamics(state + 0.5 * h * b)
        d = dynamics(state + h * c)
        state = state + h / 6 * (a + 2 * b + 2 * c + d)
    return state


@dataclass(frozen=True)
class System:
    """A system to be observed.

    Attributes:
        name: for messages.
        dynamics: time derivative of states (..., d).
        start: draws n first states (n, d).
        observe: what is seen of states (..., d) without noise, (..., p).
        noise: standard deviation of the observations' noise.
        interval: time between observations.
        substeps: Runge-Kutta steps in it.
        scale: states are divided by it in targets and errors, (d,).
    """

    name: str
    dynamics: Dynamics
    start: Callable[[int, torch.Generator], Tensor]
    observe: Callable[[Tensor], Tensor]
    noise: float
    interval: float
    substeps: int
    scale: Tensor

    def advance(self, state: Tensor) -> Tensor:
        """The state at the next observation."""
        return runge_kutta(self.dynamics, state, self.interval, self.substeps)


def _pendulum_start(count: int, generator: torch.Generator) -> Tensor:
    uniform = 2 * torch.rand(count, 2, generator=generator, dtype=torch.float64) - 1
    return uniform * torch.tensor([2.5, 1.0], dtype=torch.float64)


def _lorenz_start(count: int, generator: torch.Generator) -> Tensor:
    state = FORCING + torch.randn(count, 8, generator=generator, dtype=torch.float64)
    return runge_kutta(lorenz96, state, 6.0, 200)  # until it is on the attractor


PENDULUM = System(
    "pendulum",
    pendulum,
    _pendulum_start,
    lambda state: state[..., :1].sin(),  # two angles in (-π, π) have this sine
    0.3,
    0.06,
    3,
    torch.tensor([1.0, 4.0], dtype=torch.float64),
)
LORENZ96 = System(
    "Lorenz-96",
    lorenz96,
    _lorenz_start,
    lambda state: state.pow(4).clamp(max=10),  # no sign, and nothing beyond |x| = 1.8
    1.0,
    0.03,
    1,
    torch.full((8,), 3.6, dtype=torch.float64),
)


@dataclass(frozen=True)
class Trajectories:
    """States and noisy observations of some trajectories.

    Attributes:
        states: in units of the system's scale, (B, T, d).
        observations: (B, T, p).
    """

    states: Tensor
    observations: Tensor

    def __post_init__(self) -> None:
        real = (torch.float32, torch.float64)
        check_tensor("states", self.states, (None, None, None), real)
        check_tensor("observations", self.observations, (*self.states.shape[:2], None), real)


def trajectories(
    system: System, count: int, times: int, generator: torch.Generator
) -> Trajectories:
    """Draw trajectories of ``times`` observations each."""
    check_count("trajectories", count)
    check_count("times", times)
    states = [system.start(count, generator)]
    for _ in range(times - 1):
        states.append(system.advance(states[-1]))
    path = torch.stack(states, 1)
    seen = system.observe(path)
    error = torch.randn(seen.shape, generator=generator, dtype=seen.dtype)
    return Trajectories(path / system.scale, seen + system.noise * error)
