"""Small versions of three networks with skip connections; plain modules without a word of stages.

ResNet (He et al. 2016) and FC-DenseNet (Jegou et al. 2017) have batch norm, U-Net (Ronneberger et
al. 2015) has group norm, which knows no batch. There is no dropout, so that any number of ranks
trains the same weights.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Residual(nn.Module):
    """Two convolutions with batch norm, and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(h)) + self.shortcut(x))


class ResNet(nn.Module):
    """Six blocks at three resolutions, for classes of images."""

    def __init__(self, classes: int, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        blocks, inputs = [], width
        for level in range(3):
            for stride in (1 if level == 0 else 2, 1):
                blocks.append(Residual(inputs, width * 2**level, stride))
                inputs = width * 2**level
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(F.relu(self.stem(x))).mean((2, 3)))


class Double(nn.Module):
    """Two convolutions with group norm."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(4, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(4, outputs)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(h)))


class UNet(nn.Module):
    """Two levels down and up with a skip at each, for classes of pixels."""

    def __init__(self, classes: int, width: int = 8) -> None:
        super().__init__()
        self.down1 = Double(1, width)
        self.down2 = Double(width, 2 * width)
        self.bottom = Double(2 * width, 4 * width)
        self.grow2 = nn.ConvTranspose2d(4 * width, 2 * width, 2, 2)
        self.up2 = Double(4 * width, 2 * width)
        self.grow1 = nn.ConvTranspose2d(2 * width, width, 2, 2)
        self.up1 = Double(2 * width, width)
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip1 = self.down1(x)
        skip2 = self.down2(F.max_pool2d(skip1, 2))
        h = self.bottom(F.max_pool2d(skip2, 2))
        h = self.up2(torch.cat([skip2, self.grow2(h)], 1))
        h = self.up1(torch.cat([skip1, self.grow1(h)], 1))
        return self.head(h)


class Dense(nn.Module):
    """Layers that each read the input and all layers before; gives the layers' results."""

    def __init__(self, inputs: int, depth: int, growth: int) -> None:
        super().__init__()
        widths = [inputs + number * growth for number in range(depth)]
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for width in widths)
        self.convs = nn.ModuleList(nn.Conv2d(width, growth, 3, padding=1) for width in widths)

    def forward(self, x: Tensor) -> Tensor:
        results = [x]
        for norm, conv in zip(self.norms, self.convs, strict=True):
            results.append(conv(F.relu(norm(torch.cat(results, 1)))))
        return torch.cat(results[1:], 1)


class FCDenseNet(nn.Module):
    """Dense blocks down and up with a skip at each of two levels, for classes of pixels."""

    def __init__(self, classes: int, width: int = 12, depth: int = 3, growth: int = 6) -> None:
        super().__init__()
        new = depth * growth
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.down1 = Dense(width, depth, growth)
        self.shrink1 = nn.Conv2d(width + new, width + new, 1)
        self.down2 = Dense(width + new, depth, growth)
        self.shrink2 = nn.Conv2d(width + 2 * new, width + 2 * new, 1)
        self.bottom = Dense(width + 2 * new, depth, growth)
        self.grow2 = nn.ConvTranspose2d(new, new, 2, 2)
        self.up2 = Dense(width + 3 * new, depth, growth)
        self.grow1 = nn.ConvTranspose2d(new, new, 2, 2)
        self.up1 = Dense(width + 2 * new, depth, growth)
        self.head = nn.Conv2d(new, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        skip1 = torch.cat([x, self.down1(x)], 1)
        x = F.max_pool2d(self.shrink1(skip1), 2)
        skip2 = torch.cat([x, self.down2(x)], 1)
        x = self.bottom(F.max_pool2d(self.shrink2(skip2), 2))
        x = self.up2(torch.cat([skip2, self.grow2(x)], 1))
        x = self.up1(torch.cat([skip1, self.grow1(x)], 1))
        return self.head(x)
