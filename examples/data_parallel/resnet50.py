"""ResNet-50 on photographs, for predictions: ``graphopt simulate … --mesh dp=27600 …``.

The factory returns the model with random weights and the batch of one rank.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BATCH = 32  # per rank


class Bottleneck(nn.Module):
    """Narrow, convolve, widen, and add the input."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.narrow = _convolution(inputs, width, 1)
        self.middle = _convolution(width, width, 3, stride)
        self.widen = _convolution(width, outputs, 1)
        same = stride == 1 and inputs == outputs
        self.skip: nn.Module = nn.Identity() if same else _convolution(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.middle(F.relu(self.narrow(x))))
        return F.relu(self.widen(h) + self.skip(x))


class ResNet50(nn.Module):
    """He et al., arXiv 1512.03385, with the stride in the middle convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _convolution(3, 64, 7, 2)
        blocks: list[nn.Module] = []
        inputs = 64
        for width, count in ((64, 3), (128, 4), (256, 6), (512, 3)):
            for index in range(count):
                stride = 2 if index == 0 and width > 64 else 1
                blocks.append(Bottleneck(inputs, width, stride))
                inputs = 4 * width
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(inputs, 1000)

    def forward(self, x: Tensor) -> Tensor:
        h = F.max_pool2d(F.relu(self.stem(x)), 3, 2, 1)
        return self.head(self.blocks(h).mean((2, 3)))


def make() -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The model and one rank's batch of photographs."""
    return ResNet50(), (torch.randn(BATCH, 3, 224, 224),)


def _convolution(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False), nn.BatchNorm2d(outputs)
    )
