"""Image models of the corpus."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Made = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


def resnet() -> Made:
    """A residual network of basic blocks with batch norm, in three stages."""
    stem = nn.Sequential(_conv(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
    blocks = [_BasicBlock(8, 8, 1), _BasicBlock(8, 16, 2), _BasicBlock(16, 32, 2)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)]
    return nn.Sequential(stem, *blocks, *head), (torch.randn(4, 3, 16, 16),), {}


def densenet() -> Made:
    """Two dense blocks: every layer reads all earlier ones."""
    layers = [
        _conv(3, 8, 3),
        _DenseLayer(8, 4),
        _DenseLayer(12, 4),
        nn.Sequential(nn.BatchNorm2d(16), nn.ReLU(), _conv(16, 8, 1), nn.AvgPool2d(2)),
        _DenseLayer(8, 4),
        nn.Sequential(nn.BatchNorm2d(12), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Linear(12, 5),
    ]
    return nn.Sequential(*layers), (torch.randn(2, 3, 12, 12),), {}


def unet() -> Made:
    """An encoder and decoder with skip connections across two scales."""
    return _UNet(), (torch.randn(2, 1, 16, 16),), {}


def mobilenet() -> Made:
    """Depthwise separable inverted residuals with capped activations."""
    layers = [
        _conv(3, 8, 3, stride=2),
        nn.BatchNorm2d(8),
        nn.ReLU6(inplace=True),
        _InvertedResidual(8, 8, stride=1),
        _InvertedResidual(8, 12, stride=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(12, 10),
    ]
    return nn.Sequential(*layers), (torch.randn(4, 3, 16, 16),), {}


def group_and_instance_norm() -> Made:
    """Normalisations that do not mix samples, instance norm with running statistics."""
    layers = [
        nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect"),
        nn.GroupNorm(2, 8),
        nn.SiLU(),
        nn.ConvTranspose2d(8, 6, 2, stride=2),
        nn.InstanceNorm2d(6, affine=True, track_running_stats=True),
        nn.LeakyReLU(0.1),
        nn.Conv2d(6, 2, 1),
    ]
    return nn.Sequential(*layers), (torch.randn(2, 3, 6, 6),), {}


def vit() -> Made:
    """A vision transformer around `nn.MultiheadAttention`."""
    return _VisionTransformer(), (torch.randn(2, 3, 8, 8),), {}


# -- parts -----------------------------------------------------------------------------------------


def _conv(inputs: int, outputs: int, size: int, *, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, groups=groups, bias=False)


class _BasicBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv(inputs, outputs, 3, stride=stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = _conv(outputs, outputs, 3)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1:
            down = _conv(inputs, outputs, 1, stride=stride)
            self.downsample = nn.Sequential(down, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        y += self.downsample(x)
        return F.relu(y, inplace=True)


class _DenseLayer(nn.Module):
    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(inputs)
        self.conv = _conv(inputs, growth, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(F.relu(self.norm(x)))], 1)


class _InvertedResidual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        hidden = 2 * inputs
        self.adds = stride == 1 and inputs == outputs
        self.body = nn.Sequential(
            _conv(inputs, hidden, 1),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(inplace=True),
            _conv(hidden, hidden, 3, stride=stride, groups=hidden),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(inplace=True),
            _conv(hidden, outputs, 1),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return x + y if self.adds else y


class _UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([self._double(1, 4), self._double(4, 8)])
        self.bottom = self._double(8, 16)
        self.up = nn.ModuleList(
            [nn.ConvTranspose2d(16, 8, 2, stride=2), nn.ConvTranspose2d(8, 4, 2, stride=2)]
        )
        self.merge = nn.ModuleList([self._double(16, 8), self._double(8, 4)])
        self.head = nn.Conv2d(4, 2, 1)

    @staticmethod
    def _double(inputs: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(
            _conv(inputs, outputs, 3),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 3, padding=1),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for down in self.down:
            x = down(x)
            skips.append(x)
            x = F.max_pool2d(x, 2)
        x = self.bottom(x)
        for up, merge, skip in zip(self.up, self.merge, reversed(skips), strict=True):
            x = merge(torch.cat([skip, up(x)], 1))
        logits: Tensor = self.head(x)
        return F.interpolate(logits, scale_factor=2.0, mode="bilinear")


class _VisionTransformer(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, stride=4)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.randn(1, 5, width) * 0.02)
        self.norm1 = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 4, dropout=0.1, batch_first=True)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Dropout(0.1), nn.Linear(2 * width, width)
        )
        self.head = nn.Linear(width, 10)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patches(image).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        x = x + self.mlp(self.norm2(x))
        logits: Tensor = self.head(x[:, 0])
        return logits
