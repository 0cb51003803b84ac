"""A small model for the command line: ``graphopt show examples/small.py:make``.

A factory returns the model and the inputs of one call of it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Small(nn.Module):
    """A convolution with batch norm, and a linear classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm(self.conv(x)))
        return self.head(h.mean((2, 3)))


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The model and a batch of four images."""
    return Small(), (torch.randn(4, 3, 16, 16),)


def make_eval() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The same in evaluation mode, for inference."""
    return Small().eval(), (torch.randn(4, 3, 16, 16),)
