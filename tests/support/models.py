"""Small models for jobs of several ranks, and plain data-parallel steps to compare with."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 4)
    )


class Tied(nn.Module):
    """Embedding and head share one parameter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embed = nn.Embedding(11, 6)
        self.mix = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.head(torch.relu(self.mix(self.embed(tokens))))
        return out


def conv_net() -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    ).to(memory_format=torch.channels_last)


def batch(name: str, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if name == "tied":
        return torch.randint(0, 11, (4, 5), generator=generator)
    shape = (6, 8) if name == "mlp" else (4, 3, 8, 8)
    return torch.randn(shape, generator=generator)


MODELS = {"mlp": mlp, "tied": Tied, "conv": conv_net}
