"""Models with a geometry: what `low_rank` is for, small enough for a test."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TOKENS, CHANNELS = 64, 6
# Any form within the tolerance, without timing; the forms of tests are too small to be faster.
ANY = "low_rank{tolerance=0.0001,smallest=32,gain=0.01,cost=roofline}"


def smooth(n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A kernel of points that are not evenly spaced: of low rank off the diagonal only."""
    generator = torch.Generator().manual_seed(5)
    x = torch.rand(n, generator=generator, dtype=torch.float64).sort()[0]
    return (torch.exp(-3 * (x[:, None] - x).abs()) / n).to(dtype)


class Mixer(nn.Module):
    """Tokens mixed by a layer, by a convolution as a matrix, and by a matrix from the left."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.mix = nn.Linear(TOKENS, TOKENS)
        self.convolve = nn.Parameter(torch.zeros(TOKENS, TOKENS))
        self.left = nn.Parameter(torch.zeros(TOKENS, TOKENS))
        self.out = nn.Linear(CHANNELS, CHANNELS)
        self.dense = nn.Linear(TOKENS, TOKENS)
        self.to(dtype)
        i = torch.arange(TOKENS, dtype=torch.float64)
        with torch.no_grad():
            self.mix.weight.copy_(smooth(TOKENS))
            self.convolve.copy_(torch.exp(-((i[:, None] - i) ** 2) / 4) * (i[:, None] >= i) / 8)
            self.left.copy_(torch.outer(i.cos(), i.sin()) / 64 + torch.outer(i / 64, i / 64) / 32)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, tokens, channels] to the same."""
        rows = x.transpose(1, 2)
        rows = torch.tanh(self.mix(rows)) + rows @ self.convolve.t()
        x = F.relu(self.out(rows.transpose(1, 2)))
        return self.left @ x + self.dense(x.transpose(1, 2)).transpose(1, 2)


def batch(dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Tokens for a `Mixer`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, TOKENS, CHANNELS, generator=generator, dtype=dtype)


class Convolution(nn.Module):
    """A long causal convolution written as a matrix, whose taps are of no low rank."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        taps = torch.randn(TOKENS, generator=generator, dtype=torch.float64) / TOKENS**0.5
        distance = torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)
        weight = torch.where(distance >= 0, taps[distance.clamp(min=0)], 0.0)
        self.weight = nn.Parameter(weight.to(dtype))
        self.out = nn.Linear(CHANNELS, CHANNELS, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, tokens, channels] to the same."""
        made: Tensor = self.out(torch.tanh(self.weight @ x))
        return made


def all_forms() -> nn.Module:
    """One product, batched ones, and transforms."""
    return nn.Sequential(Mixer(), Convolution())
