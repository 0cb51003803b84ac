"""Models that are trained by numbers of a schedule: diffusion at whole timesteps, a beta-VAE."""

from __future__ import annotations

import copy
import math
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphopt
from graphopt.model.controller import controller_of
from graphopt.model.surface import restore


class UNet(nn.Module):
    """Predicts the noise of a step; the timestep is a Python number."""

    def __init__(self, width: int = 8, steps: int = 1000) -> None:
        super().__init__()
        self.width, self.steps = width, steps
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.enter = nn.Conv2d(1, width, 3, padding=1)
        self.down = nn.Conv2d(width, width, 3, stride=2, padding=1)
        self.norm = nn.GroupNorm(2, width)
        self.up = nn.ConvTranspose2d(width, width, 4, stride=2, padding=1)
        self.leave = nn.Conv2d(2 * width, 1, 3, padding=1)
        self.register_buffer("betas", torch.linspace(1e-4, 0.02, steps))

    def embedding(self, t: int) -> Tensor:
        half = self.width // 2
        angles = t * torch.exp(-math.log(1e4) * torch.arange(half) / half)
        return self.time(torch.cat([angles.sin(), angles.cos()]))

    def forward(self, x: Tensor, t: int) -> tuple[Tensor, Tensor]:
        kept = math.cos((t / self.steps + 0.008) / 1.008 * math.pi / 2) ** 2
        noise = torch.randn_like(x)
        noisy = math.sqrt(kept) * x + math.sqrt(1 - kept) * noise
        h = F.silu(self.enter(noisy))
        low = F.silu(self.norm(self.down(h)) + self.embedding(t)[None, :, None, None])
        found = self.leave(torch.cat([h, self.up(low)], 1))
        return found, F.mse_loss(found, noise) / (1 - self.betas[t])


class BetaVAE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = nn.Linear(12, 8), nn.Linear(4, 12)
        self.beta = 0.0
        self.seen = 0

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.seen += len(x)
        mean, log_variance = self.encode(x).chunk(2, -1)
        z = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
        parts = 1 + log_variance - mean.square() - log_variance.exp()
        divergence = -0.5 * parts.sum(-1).mean()
        return z, F.mse_loss(self.decode(z), x) + self.beta * divergence


def _train(model: nn.Module, calls: Any) -> None:
    """Steps of SGD beside eager's: outputs, gradients and parameters have the same bits."""
    plain = copy.deepcopy(model)
    restore(plain)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step, call in enumerate(calls):
            results = []
            for m in (model, plain):
                torch.manual_seed(step)
                m.zero_grad()
                output, loss = call(m)
                loss.backward()
                results.append([output, loss, *(p.grad.clone() for p in m.parameters())])
                with torch.no_grad():
                    for p in m.parameters():
                        p -= 0.05 * p.grad
            for a, b in zip(*results, strict=True):
                assert torch.equal(a, b), step


def test_a_diffusion_net_takes_two_captures_for_all_timesteps() -> None:
    torch.manual_seed(0)
    model = graphopt.optimize(UNet(), backend="eager")
    x = torch.randn(2, 1, 8, 8)
    timesteps = (17, 999, 0, 1, 250, 3, 731, 2, 500)
    _train(model, [lambda m, t=t: m(x, t) for t in timesteps])
    assert controller_of(model).made == 2
    assert "numbers    t" in model.explain()


def test_an_annealed_vae_takes_two_captures() -> None:
    torch.manual_seed(0)
    model = graphopt.optimize(BetaVAE(), backend="eager")

    def call(step: int) -> Any:
        def run(m: nn.Module) -> Any:
            m.beta = min(1.0, step / 6)
            return m(torch.ones(4, 12))

        return run

    _train(model, [call(step) for step in range(9)])
    assert controller_of(model).made == 2
    assert model.seen == 36
    assert "numbers    self.beta, self.seen" in model.explain()
