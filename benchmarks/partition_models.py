"""The convolutional networks that are cut into stages; their shapes are those of the papers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Bottleneck(nn.Module):
    """The block of ResNet-50."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.down: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.down = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(self.conv1(x)))
        h = F.relu(self.bn2(self.conv2(h)))
        return F.relu(self.bn3(self.conv3(h)) + self.down(x))


class ResNet50(nn.Module):
    """For 1000 classes of 224 x 224 images (He et al. 2016)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        blocks, inputs = [], 64
        for width, depth, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
            for index in range(depth):
                blocks.append(Bottleneck(inputs, width, stride if index == 0 else 1))
                inputs = 4 * width
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(inputs, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        return self.head(self.blocks(x).mean((2, 3)))


class SmallBlock(nn.Module):
    """The block of the CIFAR ResNets: a shortcut without parameters."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.more = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(self.conv1(x)))
        h = self.bn2(self.conv2(h))
        if self.more:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.more))
        return F.relu(h + x)


class ResNet110(nn.Module):
    """For 32 x 32 images (He et al. 2016): 54 blocks."""

    def __init__(self, depth: int = 18) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        blocks, inputs = [], 16
        for width, stride in ((16, 1), (32, 2), (64, 2)):
            for index in range(depth):
                blocks.append(SmallBlock(inputs, width, stride if index == 0 else 1))
                inputs = width
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv(x)))
        return self.head(self.blocks(x).mean((2, 3)))


class UNet(nn.Module):
    """Four levels down and up with a skip at each (Ronneberger et al. 2015), padded."""

    def __init__(self, width: int = 64, levels: int = 4) -> None:
        super().__init__()
        widths = [width * 2**level for level in range(levels + 1)]
        self.down = nn.ModuleList(
            _double(3 if level == 0 else widths[level - 1], widths[level])
            for level in range(levels)
        )
        self.bottom = _double(widths[levels - 1], widths[levels])
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(widths[level + 1], widths[level], 2, 2)
            for level in reversed(range(levels))
        )
        self.joined = nn.ModuleList(
            _double(2 * widths[level], widths[level]) for level in reversed(range(levels))
        )
        self.head = nn.Conv2d(width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for block in self.down:
            x = block(x)
            skips.append(x)
            x = F.max_pool2d(x, 2)
        x = self.bottom(x)
        for up, block in zip(self.up, self.joined, strict=True):
            x = block(torch.cat([skips.pop(), up(x)], 1))
        return self.head(x)


def _double(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(outputs, outputs, 3, padding=1),
        nn.ReLU(),
    )


class DenseLayer(nn.Module):
    """Normalise, activate, convolve to 16 new channels, drop out."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(inputs)
        self.conv = nn.Conv2d(inputs, growth, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.conv(F.relu(self.bn(x))), 0.2, self.training)


class DenseBlock(nn.Module):
    """Each layer reads all before it; returns the input with all, or only what is new."""

    def __init__(self, inputs: int, growth: int, depth: int, *, whole: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            DenseLayer(inputs + index * growth, growth) for index in range(depth)
        )
        self.whole = whole

    def forward(self, x: Tensor) -> Tensor:
        new: list[Tensor] = []
        for layer in self.layers:
            new.append(layer(torch.cat([x, *new], 1) if new else x))
        return torch.cat([x, *new] if self.whole else new, 1)


class FCDenseNet103(nn.Module):
    """Dense blocks of 4, 5, 7, 10, 12 layers down, 15, and the same up (Jegou et al. 2017)."""

    def __init__(
        self, depths: tuple[int, ...] = (4, 5, 7, 10, 12), bottom: int = 15, growth: int = 16
    ) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 48, 3, padding=1)
        channels, skips = 48, []
        self.down, self.shrink = nn.ModuleList(), nn.ModuleList()
        for depth in depths:
            self.down.append(DenseBlock(channels, growth, depth, whole=True))
            channels += depth * growth
            skips.append(channels)
            self.shrink.append(
                nn.Sequential(
                    nn.BatchNorm2d(channels),
                    nn.ReLU(),
                    nn.Conv2d(channels, channels, 1),
                    nn.Dropout(0.2),
                    nn.MaxPool2d(2),
                )
            )
        self.bottom = DenseBlock(channels, growth, bottom, whole=False)
        channels = bottom * growth
        self.grow, self.up = nn.ModuleList(), nn.ModuleList()
        for index, depth in enumerate(reversed(depths)):
            self.grow.append(nn.ConvTranspose2d(channels, channels, 3, 2, 1, 1))
            last = index == len(depths) - 1
            inputs = channels + skips.pop()
            self.up.append(DenseBlock(inputs, growth, depth, whole=last))
            channels = inputs + depth * growth if last else depth * growth
        self.head = nn.Conv2d(channels, 12, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        skips = []
        for block, shrink in zip(self.down, self.shrink, strict=True):
            x = block(x)
            skips.append(x)
            x = shrink(x)
        x = self.bottom(x)
        for grow, block in zip(self.grow, self.up, strict=True):
            x = block(torch.cat([grow(x), skips.pop()], 1))
        return self.head(x)


def models() -> dict[str, tuple[nn.Module, Tensor]]:
    """Each network with one micro-batch, on the meta-free CPU; only shapes matter."""
    torch.manual_seed(0)
    return {
        "ResNet-50": (ResNet50(), torch.randn(4, 3, 224, 224)),
        "ResNet-110": (ResNet110(), torch.randn(16, 3, 32, 32)),
        "U-Net": (UNet(), torch.randn(2, 3, 128, 128)),
        "FC-DenseNet-103": (FCDenseNet103(), torch.randn(2, 3, 128, 128)),
    }
