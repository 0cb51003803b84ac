"""Models that tests name on the command line, right and wrong ones."""

from __future__ import annotations

import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.norm(self.conv(x))) + x


class Net(nn.Module):
    def __init__(self, width: int = 4, blocks: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3)
        self.layers = nn.ModuleList(Block(width) for _ in range(blocks))
        self.head = nn.Linear(width, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean((2, 3)))


class Mlp(nn.Module):
    """Computes one value twice, so that the cleanup pass finds something."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
        y = self.drop(self.lin(x) * scale)
        return torch.sin(y) + torch.sin(y)


class Branching(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if x.sum() > 0 else x * 3


def net() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    return Net(), (torch.randn(2, 3, 8, 8),)


def mlp() -> tuple[nn.Module, tuple[tuple[torch.Tensor, ...], dict[str, float]]]:
    return Mlp(), ((torch.randn(2, 4),), {"scale": 2.0})


def mlp_by_keyword() -> tuple[nn.Module, dict[str, object]]:
    return Mlp(), {"x": torch.randn(2, 4), "scale": 2.0}


def branching() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    return Branching(), (torch.ones(3),)


def only_a_model() -> nn.Module:
    return Mlp()


def no_model() -> tuple[int, tuple[()]]:
    return 3, ()


def no_inputs() -> tuple[nn.Module, torch.Tensor]:
    return Mlp(), torch.ones(2, 4)


def raising() -> None:
    raise RuntimeError("no weights here")
