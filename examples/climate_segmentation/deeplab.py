"""DeepLabv3+ with a decoder at full resolution.

Chen et al., arXiv 1802.02611, as Kurth et al., SC18, changed it for storms that are a few points
wide: transposed convolutions instead of bilinear interpolation, up to the size of the input, and a
path at full resolution beside the encoder. The encoder is a ResNet-50 with norms first (He et al.,
arXiv 1603.05027) whose last two stages dilate their convolutions instead of losing more resolution.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def _conv(inputs: int, outputs: int, kernel: int = 1, dilation: int = 1) -> nn.Sequential:
    """Convolution, norm and ReLU."""
    padding = dilation * (kernel // 2)
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, padding=padding, dilation=dilation, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


class Bottleneck(nn.Module):
    """``x + conv(relu(norm(...)))`` three times: 1x1, 3x3, 1x1.

    Args:
        inputs: maps in.
        width: maps inside; four times as many come out.
        stride: of the 3x3 convolution.
        dilation: of the 3x3 convolution.
    """

    def __init__(self, inputs: int, width: int, stride: int = 1, dilation: int = 1) -> None:
        super().__init__()
        outputs = 4 * width
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, dilation, dilation, bias=False)
        self.norm3 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1)
        same = inputs == outputs and stride == 1
        self.shortcut = None if same else nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Map [n, inputs, h, w] to [n, 4 * width, h / stride, w / stride]."""
        first = F.relu(self.norm1(x))
        straight = x if self.shortcut is None else self.shortcut(first)
        h = self.conv2(F.relu(self.norm2(self.conv1(first))))
        return straight + self.conv3(F.relu(self.norm3(h)))  # type: ignore[no-any-return]


class Encoder(nn.Module):
    """Residual stages; an eighth of the resolution comes out.

    Args:
        channels: of the input.
        width: maps inside the units of the first stage; 64 is ResNet-50.
        units: per stage; 3, 4, 6, 3 is ResNet-50.
    """

    def __init__(self, channels: int, width: int, units: Sequence[int]) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(channels, width, 7, 2, 3), nn.MaxPool2d(3, stride=2, padding=1)
        )
        stages, size = [], width
        # Halved once more in the second stage; from there on, dilation keeps what a unit can see.
        for index, (count, dilation) in enumerate(zip(units, (1, 1, 2, 4), strict=True)):
            inside = width * 2**index
            blocks = []
            for unit in range(count):
                stride = 2 if index == 1 and unit == 0 else 1
                blocks.append(Bottleneck(size, inside, stride, dilation))
                size = 4 * inside
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.ModuleList(stages)
        self.norm = nn.BatchNorm2d(size)
        self.outputs, self.low_outputs = size, 4 * width

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return features at 1/8 and, from the first stage, at 1/4 of the resolution."""
        low = x = self.stages[0](self.stem(x))
        for stage in self.stages[1:]:
            x = stage(x)
        return F.relu(self.norm(x)), low


class Pyramid(nn.Module):
    """Atrous spatial pyramid pooling: the same features at several distances, and their mean.

    Args:
        inputs: maps in.
        outputs: maps of each branch, and of the result.
        rates: dilations of the 3x3 convolutions.
    """

    def __init__(self, inputs: int, outputs: int, rates: Sequence[int]) -> None:
        super().__init__()
        branches = [_conv(inputs, outputs), *(_conv(inputs, outputs, 3, rate) for rate in rates)]
        self.branches = nn.ModuleList(branches)
        self.mean = _conv(inputs, outputs)
        self.join = _conv((len(branches) + 1) * outputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Map [n, inputs, h, w] to [n, outputs, h, w]."""
        found = [branch(x) for branch in self.branches]
        mean = self.mean(x.mean((2, 3), keepdim=True)).expand_as(found[0])
        joined: Tensor = self.join(torch.cat([*found, mean], 1))
        return joined


class DeepLab(nn.Module):
    """DeepLabv3+ as Kurth et al. built it; the defaults are theirs.

    Height and width must be multiples of 8. The deconvolutions and what runs at full resolution
    have neither norm nor activation, as in their code. Strides are in the first unit of a stage,
    theirs in the last one.

    Args:
        channels: of the input.
        classes: maps of the result.
        width: maps inside the first stage of the encoder.
        units: residual units per stage of the encoder.
        rates: dilations of the pyramid; 12, 24, 36 for an encoder at 1/8.
        depth: maps of pyramid and decoder.
        low: maps that low-level features are reduced to.
        full: maps of the two convolutions beside the encoder.
    """

    def __init__(
        self,
        channels: int = 16,
        classes: int = 3,
        *,
        width: int = 64,
        units: Sequence[int] = (3, 4, 6, 3),
        rates: Sequence[int] = (12, 24, 36),
        depth: int = 256,
        low: int = 48,
        full: tuple[int, int] = (64, 128),
    ) -> None:
        super().__init__()
        self.encoder = Encoder(channels, width, units)
        self.pyramid = Pyramid(self.encoder.outputs, depth, rates)
        self.low = _conv(self.encoder.low_outputs, low)
        self.upsample = self._deconv(depth)
        self.decoder = nn.Sequential(
            _conv(depth + low, depth, 3),
            _conv(depth, depth, 3),
            self._deconv(depth),
            self._deconv(depth),
        )
        self.full = nn.Sequential(
            nn.Conv2d(channels, full[0], 3, padding=1), nn.Conv2d(full[0], full[1], 3, padding=1)
        )
        self.head = nn.Sequential(
            nn.Conv2d(depth + full[1], depth, 3, padding=1),
            nn.Conv2d(depth, depth, 3, padding=1),
            nn.Conv2d(depth, classes, 1),
        )

    @staticmethod
    def _deconv(channels: int) -> nn.ConvTranspose2d:
        return nn.ConvTranspose2d(channels, channels, 3, 2, padding=1, output_padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits.

        Args:
            x: [n, channels, height, width].

        Returns:
            [n, classes, height, width].
        """
        features, low = self.encoder(x)
        features = self.upsample(self.pyramid(features))
        features = self.decoder(torch.cat([features, self.low(low)], 1))
        logits: Tensor = self.head(torch.cat([features, self.full(x)], 1))
        return logits
