"""Weekly values at stations: an annual wave, a local cycle, a trend, a travelling wave, noise."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from graphopt.examples.common import check_tensor

STATIONS = 30
WEEKS = 104
YEAR = 52.0
NOISE = 0.25
LAST_WEEKS = 20


@dataclass(frozen=True)
class Samples:
    """Times in weeks and places, (n, 3) as (week, east, north) in [0, 1], and values (n,)."""

    inputs: Tensor
    values: Tensor

    def check(self, name: str) -> Samples:
        """Return them if they can be trained on.

        Raises:
            WorkloadError: they are empty, of another shape, or not finite.
        """
        check_tensor(f"{name} inputs", self.inputs, (None, 3))
        check_tensor(f"{name} values", self.values, (len(self.inputs),))
        return self


@dataclass(frozen=True)
class Split:
    """What is trained on, what decides between models, and what they are judged by.

    Test and validation samples are the last 20 weeks of some stations, and some whole stations.
    """

    training: Samples
    validation: Samples
    test: Samples


def make_split(generator: torch.Generator) -> Split:
    """Draw stations and their series; test: 10 stations' last weeks, and 5 whole stations."""
    places = torch.rand(STATIONS, 2, generator=generator)
    series = field(places, generator)
    order = torch.randperm(STATIONS, generator=generator)
    role = torch.zeros(STATIONS, WEEKS, dtype=torch.long)  # 0 training, 1 validation, 2 test
    role[order[:5]] = 2
    role[order[5:15], -LAST_WEEKS:] = 2
    role[order[15:18]] = 1
    role[order[18:24], -LAST_WEEKS:] = 1
    week = torch.arange(WEEKS, dtype=torch.float32).expand(STATIONS, WEEKS)
    inputs = torch.cat((week[..., None], places[:, None].expand(-1, WEEKS, -1)), dim=2)
    parts = [
        Samples(inputs[role == number], series[role == number]).check(name)
        for number, name in enumerate(("training", "validation", "test"))
    ]
    return Split(*parts)


def with_validation(split: Split) -> Samples:
    """Everything but the test samples: what the chosen models are trained on."""
    inputs = torch.cat((split.training.inputs, split.validation.inputs))
    values = torch.cat((split.training.values, split.validation.values))
    return Samples(inputs, values).check("training")


def field(places: Tensor, generator: torch.Generator) -> Tensor:
    """Series (stations, 104) at places (stations, 2)."""
    check_tensor("places", places, (None, 2))
    week = torch.arange(WEEKS, dtype=torch.float32)[None]
    east, north = places[:, :1], places[:, 1:]
    turn = 2 * torch.pi
    size = 1.0 + 0.5 * torch.sin(turn * week / WEEKS + 3.0 * north)
    annual = size * torch.sin(turn * week / YEAR + 3.0 * east + 2.0 * north)
    local = 0.8 * east * torch.cos(turn * week / 4.0 + 3.0 * north)
    trend = 1.5 * (north - 0.5) * week / WEEKS
    travelling = 0.6 * torch.sin(turn * (week / 26.0 - east - north))
    noise = NOISE * torch.randn(len(places), WEEKS, generator=generator)
    return annual + local + trend + travelling + noise
