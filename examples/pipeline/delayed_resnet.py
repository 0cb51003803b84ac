"""A small ResNet as a list of stages, for images of 8 x 8 pixels.

Every convolution is a stage with its norm. Norms are over groups of channels of one image, so that
micro-batches of one work.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHANNELS_PER_GROUP = 2  # as in Kosson et al., arXiv 2003.11666


def _norm(channels: int) -> nn.Module:
    return nn.GroupNorm(channels // CHANNELS_PER_GROUP, channels)


class Stem(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, channels, 3, padding=1, bias=False)
        self.norm = _norm(channels)

    def forward(self, images: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(images)))


class FirstHalf(nn.Module):
    """Of a residual block; what skips the block travels behind its result, as more channels."""

    def __init__(self, channels: int, result: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.missing = result - channels
        self.conv = nn.Conv2d(channels, result, 3, stride=stride, padding=1, bias=False)
        self.norm = _norm(result)

    def forward(self, x: Tensor) -> Tensor:
        skip = x[:, :, :: self.stride, :: self.stride]
        if self.missing:
            skip = F.pad(skip, (0, 0, 0, 0, 0, self.missing))
        return torch.cat([F.relu(self.norm(self.conv(x))), skip], 1)


class SecondHalf(nn.Module):
    """Of a residual block; adds what skipped it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = _norm(channels)

    def forward(self, both: Tensor) -> Tensor:
        inner, skip = both.chunk(2, 1)
        return F.relu(self.norm(self.conv(inner)) + skip)


class Head(nn.Module):
    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.mean((2, 3)))


def resnet(blocks: int, width: int, classes: int = 10) -> list[nn.Module]:
    """``6 * blocks + 2`` stages, drawn from PyTorch's global random state.

    Args:
        blocks: residual blocks at each of the three resolutions.
        width: channels at the first one; doubled at each further one.
        classes: outputs.
    """
    stages: list[nn.Module] = [Stem(width)]
    channels = width
    for level in range(3):
        for block in range(blocks):
            result = width * 2**level
            stride = 2 if level > 0 and block == 0 else 1
            stages += [FirstHalf(channels, result, stride), SecondHalf(result)]
            channels = result
    return [*stages, Head(channels, classes)]
