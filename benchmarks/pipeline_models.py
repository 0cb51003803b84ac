"""Chains of equal blocks: any pipeline of two stages cuts them in the middle."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Chain:
    """A model that stock pipelines can run, too.

    Attributes:
        model: a sequence of blocks.
        shape: of one example.
        examples: of a micro-batch.
        classes: of the target.
    """

    model: nn.Sequential
    shape: tuple[int, ...]
    examples: int
    classes: int

    def batch(self, micro_batches: int) -> tuple[Tensor, Tensor]:
        """Random inputs and targets."""
        generator = torch.Generator().manual_seed(micro_batches)
        count = self.examples * micro_batches
        x = torch.randn(count, *self.shape, generator=generator)
        return x, torch.randint(0, self.classes, (count,), generator=generator)


class Residual(nn.Module):
    """A residual block of two convolutions with group norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.GroupNorm(4, width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.GroupNorm(4, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        """As usual."""
        return torch.relu(x + self.layers(x))


class Head(nn.Module):
    """The mean over positions, and a linear layer."""

    def __init__(self, width: int, classes: int, dim: tuple[int, ...]) -> None:
        super().__init__()
        self.linear = nn.Linear(width, classes)
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.linear(x.mean(self.dim) if self.dim else x)


def chain(name: str) -> Chain:
    """``"mlp"``, ``"resnet"`` or ``"transformer"``; the same weights on every rank."""
    torch.manual_seed(0)
    if name == "mlp":
        blocks = [nn.Sequential(nn.Linear(1024, 1024), nn.ReLU()) for _ in range(6)]
        return Chain(nn.Sequential(*blocks, Head(1024, 10, ())), (1024,), 64, 10)
    if name == "resnet":
        blocks = [Residual(48) for _ in range(6)]
        return Chain(nn.Sequential(*blocks, Head(48, 10, (2, 3))), (48, 24, 24), 4, 10)
    layers = [
        nn.TransformerEncoderLayer(256, 4, 512, dropout=0.0, batch_first=True) for _ in range(4)
    ]
    return Chain(nn.Sequential(*layers, Head(256, 10, (1,))), (64, 256), 4, 10)
