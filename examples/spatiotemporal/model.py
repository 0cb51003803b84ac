"""A Bayesian Neural Field: features of time and place, then a small network with learned scales.

One particle is a `Field`; an `Ensemble` holds particles in stacked parameters and runs them all by
`torch.func.vmap`. Training maximises each particle's log posterior (MAP ensemble) or the evidence
bound of a normal distribution over each parameter (`Variational`).

Reference: Saad, Burnim, Carroll, Patton, Köster, Saurous, Hoffman, "Scalable spatiotemporal
prediction with Bayesian neural fields", Nature Communications 2024 (arXiv:2403.07657).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap


@dataclass(frozen=True)
class Features:
    """What a field is a function of, beside time and place themselves.

    Attributes:
        fourier: for time, east, north: how many octaves of cos and sin; 0 for none.
        periods: of seasons, in weeks.
        harmonics: how many of each period.
        products: whether products of two of the three inputs are features.
    """

    fourier: tuple[int, int, int] = (0, 0, 0)
    periods: tuple[float, ...] = ()
    harmonics: int = 1
    products: bool = True

    def sizes(self) -> list[int]:
        """How many features each group has; the first group is the inputs themselves."""
        sizes = [3]
        sizes += [2 * degree for degree in self.fourier if degree]
        sizes += [2 * self.harmonics] * len(self.periods)
        return sizes + [3] * self.products


class Field(nn.Module):
    """One particle: inputs (n, 3) as (week, east, north) to means (n,) of the value.

    A layer is ``softplus(s) · (W h / √width_in + b)``; its activation is a mixture of elu and tanh
    with one learned proportion. Each group of features has a learned factor, each input a learned
    scale. All raw parameters have a Logistic(0, 1) prior.

    Args:
        features: of the inputs.
        scale: (3,) typical sizes of the inputs, by which they are divided.
        width: of the two hidden layers.
    """

    scale: Tensor

    def __init__(self, features: Features, scale: Tensor, width: int = 48) -> None:
        super().__init__()
        self.features = features
        self.register_buffer("scale", scale)
        self.log_scale = nn.Parameter(torch.zeros(3))
        self.group_scale = nn.Parameter(torch.zeros(len(features.sizes())))
        self.activation = nn.Parameter(torch.zeros(()))
        sizes = (sum(features.sizes()), width, width, 1)
        self.weights = nn.ParameterList(
            nn.Parameter(_truncated_normal(out, into)) for into, out in pairwise(sizes)
        )
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(size)) for size in sizes[1:])
        self.layer_scale = nn.Parameter(torch.zeros(len(sizes) - 1))
        self.log_noise = nn.Parameter(torch.zeros(()))

    def forward(self, inputs: Tensor) -> Tensor:
        """Means (n,) of the values at inputs (n, 3)."""
        hidden = self._features(inputs)
        mixture = torch.sigmoid(self.activation)
        layers = list(zip(self.weights, self.biases, strict=True))
        for index, (weight, bias) in enumerate(layers):
            scale = F.softplus(self.layer_scale[index])
            hidden = scale * (hidden @ weight.T / math.sqrt(weight.shape[1]) + bias)
            if index < len(layers) - 1:
                hidden = mixture * F.elu(hidden) + (1 - mixture) * torch.tanh(hidden)
        return hidden[:, 0]

    def _features(self, inputs: Tensor) -> Tensor:
        """Features (n, sum of `Features.sizes`)."""
        x = inputs / (self.scale * self.log_scale.exp())
        groups = [x]
        for column, degree in enumerate(self.features.fourier):
            if degree:
                octave = torch.arange(degree, device=x.device)
                angle = 2 * torch.pi * x[:, column, None] * 2.0**octave
                groups.append(torch.cat((angle.cos(), angle.sin()), 1) / (octave + 1).repeat(2))
        harmonic = torch.arange(1, self.features.harmonics + 1, device=x.device)
        for period in self.features.periods:
            angle = 2 * torch.pi * inputs[:, :1] * harmonic / period
            groups.append(torch.cat((angle.cos(), angle.sin()), 1) / harmonic.repeat(2))
        if self.features.products:
            groups.append(torch.stack((x[:, 0] * x[:, 1], x[:, 0] * x[:, 2], x[:, 1] * x[:, 2]), 1))
        factors = F.softplus(self.group_scale)
        return torch.cat([factor * group for factor, group in zip(factors, groups, strict=True)], 1)


def _truncated_normal(rows: int, columns: int) -> Tensor:
    """Standard normal numbers within [-2, 2], by inverting the distribution function."""
    low = 0.5 * (1 + math.erf(-2 / math.sqrt(2)))
    uniform = torch.rand(rows, columns) * (1 - 2 * low) + low
    return math.sqrt(2) * torch.erfinv(2 * uniform - 1)


def log_prior(parameters: list[Tensor]) -> Tensor:
    """Log density of Logistic(0, 1) of all elements together, a scalar."""
    return -torch.stack([(p.abs() + 2 * F.softplus(-p.abs())).sum() for p in parameters]).sum()


def noise_sd(log_noise: Tensor) -> Tensor:
    """Standard deviation of the values about the mean; of any shape."""
    return 0.01 + log_noise.exp()


def log_likelihood(mean: Tensor, sd: Tensor, values: Tensor) -> Tensor:
    """Log density of values (n,) under normal distributions, a scalar."""
    error = (values - mean) / sd
    return (-0.5 * error.square() - sd.log() - 0.5 * math.log(2 * math.pi)).sum()


class Ensemble(nn.Module):
    """Particles with stacked parameters; forward returns what each of them is trained on.

    Args:
        particles: fields of one form, whose parameters are the start.
        route: ``vmap`` of one field's forward, or ``loop`` over the particles.
    """

    scale: Tensor

    def __init__(self, particles: list[Field], route: Literal["vmap", "loop"] = "vmap") -> None:
        super().__init__()
        stacked, _ = stack_module_state(particles)
        self.names = list(stacked)
        self.size = len(particles)
        self.route = route
        self.stacked = nn.ParameterList(nn.Parameter(p.detach()) for p in stacked.values())
        self.register_buffer("scale", particles[0].scale.clone())
        # The form of a particle. In a list, it is no submodule: its own parameters are unused.
        self._form = [particles[0]]

    def forward(self, inputs: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Negative log posterior of each particle (particles,), and means (particles, n)."""
        return self.mapped(list(self.stacked), inputs, values)

    def mapped(
        self, stacked: list[Tensor], inputs: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor]:
        """`forward` with other parameters, stacked in the same way."""
        if self.route == "vmap":
            of_all = vmap(self._one, in_dims=(0, None, None))
            mapped: tuple[Tensor, Tensor] = of_all(stacked, inputs, values)
            return mapped
        one = [self._one([p[i] for p in stacked], inputs, values) for i in range(self.size)]
        return torch.stack([loss for loss, _ in one]), torch.stack([mean for _, mean in one])

    def _one(self, parameters: list[Tensor], inputs: Tensor, values: Tensor) -> tuple[Tensor, Any]:
        named = dict(zip(self.names, parameters, strict=True))
        mean = functional_call(self._form[0], {**named, "scale": self.scale}, (inputs,))
        sd = noise_sd(named["log_noise"])
        return -log_likelihood(mean, sd, values) - log_prior(parameters), mean

    def noise(self, stacked: Sequence[Tensor] | None = None) -> Tensor:
        """Standard deviation of the noise of each particle (particles,)."""
        parameters = list(self.stacked) if stacked is None else stacked
        return noise_sd(parameters[self.names.index("log_noise")].detach())


class Variational(nn.Module):
    """An independent normal distribution over each parameter of one field.

    Args:
        field: whose parameters are the means to start from.
        samples: how many draws an evaluation of the bound takes.
        weight: of the divergence from the prior; 1 is the evidence bound.
    """

    def __init__(self, field: Field, samples: int = 5, weight: float = 0.1) -> None:
        super().__init__()
        self.ensemble = Ensemble([field] * samples)
        start = [p.detach()[0].clone() for p in self.ensemble.stacked]
        self.ensemble.stacked = nn.ParameterList()
        self.means = nn.ParameterList(nn.Parameter(p) for p in start)
        raw = math.log(math.expm1(0.3))
        self.raw_sds = nn.ParameterList(nn.Parameter(torch.full_like(p, raw)) for p in start)
        self.weight = weight

    def draw(self, noise: list[Tensor]) -> list[Tensor]:
        """Parameters (draws, …) from standard normal numbers of the same shapes."""
        parts = zip(self.means, self.raw_sds, noise, strict=True)
        return [mean + F.softplus(raw) * z for mean, raw, z in parts]

    def forward(self, inputs: Tensor, values: Tensor, noise: list[Tensor]) -> Tensor:
        """Minus log likelihood plus weighted divergence, by the draws that `noise` gives."""
        drawn = self.draw(noise)
        loss, _ = self.ensemble.mapped(drawn, inputs, values)
        # The loss of a draw holds the whole log prior; the divergence has it with its weight.
        prior = log_prior(drawn) / len(drawn[0])
        entropy = torch.stack([F.softplus(raw).log().sum() for raw in self.raw_sds]).sum()
        return loss.mean() + prior - self.weight * (prior + entropy)
