"""The deep Bayesian filter: a Gaussian filter in a latent space where the dynamics are linear.

Tarumi, Fukuda and Maeda (arXiv 2405.18674). The latent state h has the dynamics h' = A h + N(0, Q).
Networks read an observation as a Gaussian r(h|o) = N(f(o), (G(o)⁻¹ + V⁻¹)⁻¹), the posterior under a
virtual prior N(0, V). Then p(o|h) is r(h|o) divided by that prior, and filtering has a closed form:

    predict   μ⁻ = A μ,   Σ⁻ = A Σ Aᵀ + Q
    update    Σ⁻¹ = (Σ⁻)⁻¹ + G⁻¹,   Σ⁻¹μ = (Σ⁻)⁻¹μ⁻ + (G⁻¹ + V⁻¹) f
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn

from graphopt.examples.data_assimilation.recursion import (
    Belief,
    beliefs_in_sequence,
    diagonal,
    divergence,
    predict,
    samples,
    update,
)

INITIAL_VARIANCE = 100.0
VIRTUAL_PRIOR_PRECISION = 1e-8


def mlp(inputs: int, outputs: int, width: int, depth: int) -> nn.Sequential:
    """A perceptron with ``depth`` hidden layers."""
    sizes = [inputs, *[width] * depth]
    hidden = [layer for n, m in itertools.pairwise(sizes) for layer in (nn.Linear(n, m), nn.SiLU())]
    return nn.Sequential(*hidden, nn.Linear(width, outputs))


class Evidence(nn.Module):
    """The inverse observation operator: what an observation says of the latent state."""

    def __init__(self, observed: int, planes: int, width: int, depth: int) -> None:
        super().__init__()
        self.center = mlp(observed, 2 * planes, width, depth)
        self.log_precision = mlp(observed, 2 * planes, width, depth)

    def forward(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        """Precision J = G⁻¹ (2, 2, B, T, K) and information η = (G⁻¹ + V⁻¹) f (2, B, T, K).

        Args:
            observations: of shape (B, T, observed).
        """
        center = _planes(self.center(observations))
        precision = _planes(self.log_precision(observations)).exp()
        return diagonal(precision), (precision + VIRTUAL_PRIOR_PRECISION) * center


class Recursion(nn.Module):
    """Filtering, a few time steps per call.

    A is block-diagonal: K planes, each turned by its angle and scaled by exp(growth) per time step.
    """

    def __init__(self, planes: int, fastest: float, log_noise: float) -> None:
        super().__init__()
        self.angle = nn.Parameter(torch.linspace(0, fastest, planes, dtype=torch.float64))
        self.growth = nn.Parameter(torch.zeros(planes, dtype=torch.float64))
        self.noise_variance = math.exp(2 * log_noise)

    def dynamics(self) -> tuple[Tensor, Tensor]:
        """A and Q of one time step, both (2, 2, 1, K)."""
        scale = self.growth.exp()
        cos, sin = scale * self.angle.cos(), scale * self.angle.sin()
        transition = torch.stack([torch.stack([cos, -sin]), torch.stack([sin, cos])])
        noise = diagonal(torch.full_like(transition[0], self.noise_variance))
        return transition.unsqueeze(2), noise.unsqueeze(2)

    def forward(
        self, precision: Tensor, information: Tensor, mean: Tensor, covariance: Tensor
    ) -> tuple[Belief, Belief]:
        """Beliefs before each observation, and the one before the observation that comes next.

        Args:
            precision: J of the observations, (2, 2, B, T, K).
            information: η of the observations, (2, B, T, K).
            mean: what is believed before the first observation, (2, B, K).
            covariance: of that belief, (2, 2, B, K).
        """
        start = Belief(mean, covariance)
        return beliefs_in_sequence(start, *self.dynamics(), precision, information)


class Likelihood(nn.Module):
    """The decoder z = φ(h) with an error per number of the state, and the loss."""

    def __init__(self, states: int, planes: int, width: int, depth: int) -> None:
        super().__init__()
        self.decoder = mlp(2 * planes, states, width, depth)
        self.log_error = nn.Parameter(torch.zeros(states))

    def decode(self, latent: Tensor) -> Tensor:
        """States (B, T, states) of the system that latent states (2, B, T, K) stand for."""
        flat = torch.cat([latent[0], latent[1]], -1)
        decoded: Tensor = self.decoder(flat.to(self.log_error.dtype))
        return decoded

    def forward(
        self, priors: Belief, precision: Tensor, information: Tensor, states: Tensor, noise: Tensor
    ) -> Tensor:
        """The negative ELBO; see `DeepBayesianFilter.forward`."""
        posteriors = update(priors, precision, information)
        error = (states - self.decode(samples(posteriors, noise))) * (-self.log_error).exp()
        unlikely = 0.5 * error.square() + self.log_error
        batch, times, _ = states.shape
        total = divergence(posteriors, priors).sum() + unlikely.sum()
        return total / (batch * times)


class DeepBayesianFilter(nn.Module):
    """Filters observations of a nonlinear system.

    The networks see all times at once; only the recursion is a loop, of calls that have one form.
    Compiled for itself, its graph has a size that does not depend on how long trajectories are.
    The networks compute in float32, the recursion in float64.

    Args:
        observed: numbers in one observation.
        states: numbers in one state of the system.
        planes: K; the latent state has 2 K dimensions.
        width: of the hidden layers.
        depth: hidden layers of each of the three networks.
        fastest: the angles begin evenly spaced from 0 to this, in radians per time step.
        log_noise: s in Q = exp(2 s) I.
        steps: time steps per call of the recursion.
    """

    def __init__(
        self,
        observed: int,
        states: int,
        *,
        planes: int = 10,
        width: int = 64,
        depth: int = 2,
        fastest: float = 0.6,
        log_noise: float = -3.0,
        steps: int = 5,
    ) -> None:
        super().__init__()
        self.planes = planes
        self.steps = steps
        self.evidence = Evidence(observed, planes, width, depth)
        self.recursion = Recursion(planes, fastest, log_noise)
        self.likelihood = Likelihood(states, planes, width, depth)
        first = torch.zeros(2, planes, dtype=torch.float64)
        self.first_mean = nn.Parameter(first)
        self.first_log_variance = nn.Parameter(first + math.log(INITIAL_VARIANCE))

    def initial(self, batch: int) -> Belief:
        """What is believed of the first state before its observation: vectors (2, batch, K)."""
        mean = self.first_mean.unsqueeze(1).repeat(1, batch, 1)
        variance = self.first_log_variance.exp().unsqueeze(1).repeat(1, batch, 1)
        return Belief(mean, diagonal(variance))

    def beliefs(self, precision: Tensor, information: Tensor) -> tuple[Belief, Belief]:
        """Beliefs before each observation, and the one before the observation that comes next.

        Args:
            precision: J of the observations, (2, 2, B, T, K).
            information: η of the observations, (2, B, T, K).
        """
        following = self.initial(precision.shape[2])
        priors = []
        calls = (torch.split(part, self.steps, -2) for part in (precision, information))
        for seen in zip(*calls, strict=True):
            before, following = self.recursion(*seen, *following)
            priors.append(before)
        return Belief(*(torch.cat(parts, -2) for parts in zip(*priors, strict=True))), following

    def filter(self, observations: Tensor) -> tuple[Belief, Belief]:
        """Beliefs after each observation, and the one before the observation that comes next.

        Args:
            observations: of shape (B, T, observed).
        """
        precision, information = self.evidence(observations)
        priors, following = self.beliefs(precision, information)
        return update(priors, precision, information), following

    @torch.no_grad()
    def estimate(self, observations: Tensor, forecast: int = 0) -> Tensor:
        """States (B, T + forecast, states) that the means of beliefs stand for.

        Args:
            observations: of shape (B, T, observed).
            forecast: further time steps without observations.
        """
        after, belief = self.filter(observations)
        means = [after.mean]
        for _ in range(forecast):
            means.append(belief.mean.unsqueeze(-2))
            belief = predict(belief, *self.recursion.dynamics())
        return self.likelihood.decode(torch.cat(means, -2))

    def forward(self, observations: Tensor, states: Tensor, noise: Tensor) -> Tensor:
        """The loss: -ELBO per trajectory and time step, with one draw of h, without the constant.

        It is the mean over time of KL(q(hₜ|o₁..ₜ) ‖ q(hₜ|o₁..ₜ₋₁)) - E log p(zₜ|hₜ).

        Args:
            observations: of shape (B, T, observed).
            states: the true ones, (B, T, states).
            noise: standard normal, (2, B, T, K), float64.
        """
        precision, information = self.evidence(observations)
        priors, _ = self.beliefs(precision, information)
        loss: Tensor = self.likelihood(priors, precision, information, states, noise)
        return loss


def _planes(flat: Tensor) -> Tensor:
    """Network outputs (B, T, 2 K) as vectors (2, B, T, K) of the recursion."""
    return torch.stack(flat.double().chunk(2, -1))
