"""The deep Bayesian filter: a Gaussian filter in a latent space where the dynamics are linear.

Tarumi, Fukuda and Maeda (arXiv 2405.18674). The latent state h has the dynamics h' = A h + N(0, Q).
Networks read an observation as a Gaussian r(h|o) = N(f(o), (G(o)⁻¹ + V⁻¹)⁻¹), the posterior under a
virtual prior N(0, V). Then p(o|h) is r(h|o) divided by that prior, and filtering has a closed form:

    predict   μ⁻ = A μ,   Σ⁻ = A Σ Aᵀ + Q
    update    Σ⁻¹ = (Σ⁻)⁻¹ + G⁻¹,   Σ⁻¹μ = (Σ⁻)⁻¹μ⁻ + (G⁻¹ + V⁻¹) f
"""

from __future__ import annotations

import itertools

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


class DeepBayesianFilter(nn.Module):
    """Filters observations of a nonlinear system; one call takes a few time steps.

    A is block-diagonal: K planes, each turned by its angle and scaled by exp(growth) per time step.
    The networks compute in float32, the recursion in float64.

    Args:
        observed: numbers in one observation.
        states: numbers in one state of the system.
        planes: K; the latent state has 2 K dimensions.
        width: of the hidden layers.
        depth: hidden layers of each of the three networks.
        fastest: the angles begin evenly spaced from 0 to this, in radians per time step.
        log_noise: s in Q = exp(2 s) I.
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
    ) -> None:
        super().__init__()
        self.planes = planes
        self.center = mlp(observed, 2 * planes, width, depth)
        self.log_precision = mlp(observed, 2 * planes, width, depth)
        self.decoder = mlp(2 * planes, states, width, depth)
        self.log_error = nn.Parameter(torch.zeros(states))
        self.angle = nn.Parameter(torch.linspace(0, fastest, planes, dtype=torch.float64))
        self.growth = nn.Parameter(torch.zeros(planes, dtype=torch.float64))
        self.noise_variance = torch.tensor(2 * log_noise, dtype=torch.float64).exp().item()

    def initial(self, batch: int) -> Belief:
        """What is believed of the first state before its observation: vectors (2, batch, K)."""
        like = self.angle.detach()
        mean = like.new_zeros(2, batch, self.planes)
        covariance = diagonal(torch.full_like(mean, INITIAL_VARIANCE))
        # As all later beliefs do, so that the first call is no other kind of call.
        return Belief(mean.requires_grad_(), covariance.requires_grad_())

    def dynamics(self) -> tuple[Tensor, Tensor]:
        """A and Q of one time step, both (2, 2, 1, K)."""
        scale = self.growth.exp()
        cos, sin = scale * self.angle.cos(), scale * self.angle.sin()
        transition = torch.stack([torch.stack([cos, -sin]), torch.stack([sin, cos])])
        noise = diagonal(torch.full_like(transition[0], self.noise_variance))
        return transition.unsqueeze(2), noise.unsqueeze(2)

    def evidence(self, observations: Tensor) -> tuple[Tensor, Tensor]:
        """What observations say of h: precision G⁻¹ (2, 2, B, T, K), information (2, B, T, K)."""
        center = _planes(self.center(observations))
        precision = _planes(self.log_precision(observations)).exp()
        return diagonal(precision), (precision + VIRTUAL_PRIOR_PRECISION) * center

    def decode(self, mean: Tensor) -> Tensor:
        """States (B, T, states) of the system that latent states (2, B, T, K) stand for."""
        flat = torch.cat([mean[0], mean[1]], -1)
        decoded: Tensor = self.decoder(flat.to(self.log_error.dtype))
        return decoded

    def filter(self, observations: Tensor, before: Belief) -> tuple[Belief, Belief, Belief]:
        """Beliefs before and after each observation, and before the observation that comes next.

        Args:
            observations: of shape (B, T, observed).
            before: what is believed before the first of them, vectors (2, B, K).
        """
        precision, information = self.evidence(observations)
        priors, following = beliefs_in_sequence(before, *self.dynamics(), precision, information)
        return priors, update(priors, precision, information), following

    @torch.no_grad()
    def estimate(self, observations: Tensor, forecast: int = 0) -> Tensor:
        """States (B, T + forecast, states) that the means of beliefs stand for.

        Args:
            observations: of shape (B, T, observed).
            forecast: further time steps without observations.
        """
        _, after, belief = self.filter(observations, self.initial(len(observations)))
        transition, noise = self.dynamics()
        means = [after.mean]
        for _ in range(forecast):
            means.append(belief.mean.unsqueeze(-2))
            belief = predict(belief, transition, noise)
        return self.decode(torch.cat(means, -2))

    def loss(self, priors: Belief, posteriors: Belief, states: Tensor, noise: Tensor) -> Tensor:
        """The negative ELBO per trajectory; see `forward`."""
        error = (states - self.decode(samples(posteriors, noise))) * (-self.log_error).exp()
        unlikely = 0.5 * error.square() + self.log_error
        return (divergence(posteriors, priors).sum() + unlikely.sum()) / len(states)

    def forward(
        self,
        observations: Tensor,
        states: Tensor,
        noise: Tensor,
        mean: Tensor,
        covariance: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The loss of some time steps, and the belief to go on with.

        Args:
            observations: of shape (B, T, observed).
            states: the true ones, (B, T, states).
            noise: standard normal, (2, B, T, K), float64.
            mean: what is believed before the first observation, (2, B, K).
            covariance: of that belief, (2, 2, B, K).

        Returns:
            -ELBO per trajectory, Σₜ KL(q(hₜ|o₁..ₜ) ‖ q(hₜ|o₁..ₜ₋₁)) - E log p(zₜ|hₜ) with one draw
            of h and without the constant, and mean and covariance of the next belief.
        """
        priors, posteriors, following = self.filter(observations, Belief(mean, covariance))
        return self.loss(priors, posteriors, states, noise), following.mean, following.covariance


def _planes(flat: Tensor) -> Tensor:
    """Network outputs (B, T, 2 K) as vectors (2, B, T, K) of the recursion."""
    return torch.stack(flat.double().chunk(2, -1))


def negative_elbo(
    model: nn.Module,
    observations: Tensor,
    states: Tensor,
    noise: Tensor,
    before: Belief,
    steps: int,
) -> Tensor:
    """The loss of whole trajectories, ``steps`` time steps per call of the model.

    Gradients flow through all of them. All calls are of one kind: the model is compiled once, and
    the size of its graph does not depend on the length of trajectories.
    """
    parts = (torch.split(t, steps, -2) for t in (observations, states, noise))
    total = noise.new_zeros(())
    for chunk in zip(*parts, strict=True):
        loss, *before = model(*chunk, *before)
        total = total + loss
    return total / observations.shape[1]
