"""The networks: an AlexNet and a ResNet for small images, and a generator with its critic."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

CODE = 16  # random numbers that the generator makes an image of


class AlexNet(nn.Module):
    """Five convolutions and three linear layers for (n, 1, 8, 8), in AlexNet's order.

    Local response normalisation and pooling behind the first two convolutions and dropout before
    the first two linear layers, as in the original; less dropout, as the layers are narrow.
    """

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 48, 3, padding=1)
        self.conv3 = nn.Conv2d(48, 64, 3, padding=1)
        self.conv4 = nn.Conv2d(64, 64, 3, padding=1)
        self.conv5 = nn.Conv2d(64, 48, 3, padding=1)
        self.norm = nn.LocalResponseNorm(5)
        self.dropout = nn.Dropout(0.25)
        self.fc6 = nn.Linear(48 * 4, 128)
        self.fc7 = nn.Linear(128, 128)
        self.fc8 = nn.Linear(128, classes)
        _start(self)

    def forward(self, x: Tensor) -> Tensor:
        h = F.max_pool2d(self.norm(F.relu(self.conv1(x))), 2)
        h = F.max_pool2d(self.norm(F.relu(self.conv2(h))), 2)
        h = F.relu(self.conv4(F.relu(self.conv3(h))))
        h = F.relu(self.conv5(h)).flatten(1)
        h = F.relu(self.fc6(self.dropout(h)))
        return self.fc8(F.relu(self.fc7(self.dropout(h))))


class Block(nn.Module):
    """Two 3x3 convolutions with batch norm, and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(h)) + self.shortcut(x))


class ResNet(nn.Module):
    """A ResNet-8 for (n, 3, 8, 8): three stages of one block, as for CIFAR-10."""

    def __init__(self, classes: int = 10, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.blocks = nn.Sequential(
            Block(width, width, 1), Block(width, 2 * width, 2), Block(2 * width, 4 * width, 2)
        )
        self.head = nn.Linear(4 * width, classes)
        _start(self)

    def forward(self, x: Tensor) -> Tensor:
        h = self.blocks(F.relu(self.norm(self.stem(x))))
        return self.head(h.mean((2, 3)))


class Generator(nn.Module):
    """Images, (n, 1, 8, 8) in (-1, 1), from random numbers, (n, `CODE`): as a DCGAN."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.width = width
        self.first = nn.Linear(CODE, 2 * width * 4, bias=False)
        self.bn1 = nn.BatchNorm1d(2 * width * 4)
        self.up1 = nn.ConvTranspose2d(2 * width, width, 4, 2, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.up2 = nn.ConvTranspose2d(width, 1, 4, 2, 1)

    def forward(self, code: Tensor) -> Tensor:
        h = F.relu(self.bn1(self.first(code))).view(-1, 2 * self.width, 2, 2)
        return self.up2(F.relu(self.bn2(self.up1(h)))).tanh()


class Critic(nn.Module):
    """A number for each image, (n,): the critic of a Wasserstein GAN."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.down1 = nn.Conv2d(1, width, 4, 2, 1)
        self.down2 = nn.Conv2d(width, 2 * width, 4, 2, 1)
        self.last = nn.Linear(2 * width * 4, 1)

    def forward(self, images: Tensor) -> Tensor:
        h = F.leaky_relu(self.down1(images), 0.2)
        h = F.leaky_relu(self.down2(h), 0.2)
        return self.last(h.flatten(1)).squeeze(1)


def _start(model: nn.Module) -> None:
    """He's initial weights; PyTorch's are too small for deep networks without batch norm."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
