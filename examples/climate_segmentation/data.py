"""Synthetic weather: fields of a climate model with atmospheric rivers and tropical cyclones.

A field lies on a grid that is periodic in longitude. Random smooth fields around a zonal mean are
the background. An atmospheric river is a long curved band of moist air with wind along it. A
tropical cyclone is a vortex with a low pressure and a warm core, which turns the other way in the
south:

    v(r) = v_max (r / r_max) exp(1 - r / r_max)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from graphopt.examples.common import check_count, check_labels, check_tensor

HEIGHT, WIDTH = 48, 72
CHANNELS = ("q", "u", "v", "p", "T", "qu", "qv", "speed")
CLASSES = ("background", "atmospheric river", "tropical cyclone")
NOISE = 0.25


@dataclass(frozen=True)
class Fields:
    """Fields with their labels.

    Attributes:
        values: [n, 8, 48, 72], in units of their spread in the background: moisture q, winds u
            (eastward) and v (northward), pressure p, temperature T, transports qu and qv, and wind
            speed.
        labels: [n, 48, 72], 0 to 2, see `CLASSES`.
    """

    values: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        check_tensor("fields", self.values, (None, len(CHANNELS), HEIGHT, WIDTH))
        check_labels("labels", self.labels, (len(self.values), HEIGHT, WIDTH), len(CLASSES))

    def to(self, device: torch.device) -> Fields:
        """The same on another device."""
        return Fields(self.values.to(device), self.labels.to(device))


def make_fields(count: int, generator: Generator) -> Fields:
    """Draw fields.

    Args:
        count: how many, above zero.
        generator: on the CPU.
    """
    check_count("fields", count)
    latitude = torch.linspace(-1, 1, HEIGHT)[:, None].expand(HEIGHT, WIDTH)  # south to north
    base = _smooth(torch.randn(count, 5, HEIGHT, WIDTH, generator=generator))
    q, u, v, p, temperature = (0.5 * base).unbind(1)
    q = q + 0.6 * torch.cos(math.pi * latitude / 2)
    u = u + 0.8 * torch.sin(2 * math.pi * latitude) * latitude
    temperature = temperature + torch.cos(math.pi * latitude / 2)
    labels = torch.zeros(count, HEIGHT, WIDTH, dtype=torch.long)
    fields = {"q": q, "u": u, "v": v, "p": p, "T": temperature}
    for _ in range(2):
        _add_rivers(fields, labels, generator)
    for _ in range(2):
        _add_cyclones(fields, labels, generator)
    clean = torch.stack([fields[name] for name in CHANNELS[:5]], 1)
    q, u, v, p, temperature = (
        clean + NOISE * torch.randn(clean.shape, generator=generator)
    ).unbind(1)
    speed = (u.square() + v.square()).sqrt()
    return Fields(torch.stack([q, u, v, p, temperature, q * u, q * v, speed], 1), labels)


def _uniform(count: int, low: float, high: float, generator: Generator) -> Tensor:
    return (low + (high - low) * torch.rand(count, generator=generator)).view(-1, 1, 1)


def _add_rivers(fields: dict[str, Tensor], labels: Tensor, generator: Generator) -> None:
    """A band along y = y_c(x) in some of the fields."""
    count = len(labels)
    y = torch.arange(HEIGHT).view(1, -1, 1)
    x = torch.arange(WIDTH).view(1, 1, -1)
    present = torch.rand(count, 1, 1, generator=generator) < 0.45
    north = torch.rand(count, 1, 1, generator=generator) < 0.5
    poleward = torch.where(north, 1.0, -1.0)
    slope = poleward * _uniform(count, 0.25, 0.8, generator)
    width = _uniform(count, 1.2, 2.2, generator)
    length = _uniform(count, 9.0, 16.0, generator)
    bend = _uniform(count, -0.03, 0.03, generator)
    middle = HEIGHT / 2 + poleward * _uniform(count, 7.0, 15.0, generator)
    along = _wrap(x - _uniform(count, 0, WIDTH, generator))
    centre = middle + slope * along + bend * along.square()
    # The distance across the band is shorter than that along y.
    across = (y - centre) / (width * (1 + slope.square()).sqrt())
    shape = torch.exp(-across.square() - (along / length) ** 4) * present
    fields["q"] = fields["q"] + 1.8 * shape
    fields["u"] = fields["u"] + 1.2 * shape / (1 + slope.square()).sqrt()
    fields["v"] = fields["v"] + 1.2 * shape * slope / (1 + slope.square()).sqrt()
    labels[1.8 * shape > 0.55] = 1


def _add_cyclones(fields: dict[str, Tensor], labels: Tensor, generator: Generator) -> None:
    """A vortex in some of the fields, at low latitudes."""
    count = len(labels)
    present = torch.rand(count, 1, 1, generator=generator) < 0.5
    north = torch.rand(count, 1, 1, generator=generator) < 0.5
    turn = torch.where(north, 1.0, -1.0)  # anticlockwise in the north
    radius = _uniform(count, 1.1, 1.9, generator)
    strength = _uniform(count, 1.2, 2.5, generator) * present
    middle = HEIGHT / 2 + turn * _uniform(count, 3.0, 12.0, generator)
    y = torch.arange(HEIGHT).view(1, -1, 1) - middle
    x = _wrap(torch.arange(WIDTH).view(1, 1, -1) - _uniform(count, 0, WIDTH, generator))
    distance = (x.square() + y.square()).sqrt().clamp(min=1e-3)
    speed = strength * (distance / radius) * torch.exp(1 - distance / radius)
    core = strength * torch.exp(-((distance / (1.5 * radius)) ** 2))
    fields["u"] = fields["u"] - turn * speed * y / distance
    fields["v"] = fields["v"] + turn * speed * x / distance
    fields["p"] = fields["p"] - core
    fields["T"] = fields["T"] + 0.6 * core
    fields["q"] = fields["q"] + 0.4 * core
    labels[(distance < 1.6 * radius) & present] = 2


def _wrap(x: Tensor) -> Tensor:
    """The distance around the globe, -WIDTH / 2 to below WIDTH / 2."""
    return (x + WIDTH / 2) % WIDTH - WIDTH / 2


def _smooth(noise: Tensor, radius: float = 4.0) -> Tensor:
    """Filter white noise with a Gaussian of ``radius`` points, to a variance of 1."""
    ky = torch.fft.fftfreq(noise.shape[-2])[:, None]
    kx = torch.fft.rfftfreq(noise.shape[-1])
    response = torch.exp(-2 * (math.pi * radius) ** 2 * (kx.square() + ky.square()))
    smooth = torch.fft.irfft2(torch.fft.rfft2(noise) * response, s=noise.shape[-2:])
    scaled: Tensor = smooth / smooth.std((-2, -1), keepdim=True)
    return scaled
