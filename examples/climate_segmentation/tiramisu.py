"""Tiramisu: a fully convolutional DenseNet for images in, images out.

Jégou et al., arXiv 1611.09326. Within a dense block every layer reads the maps of all layers before
it and adds ``growth`` of its own:

    x_{l+1} = [x_l, H_l(x_l)]

Blocks on the way down are followed by a halving of the resolution, those on the way up by a
doubling. What goes up are only the *new* maps of a block, not its input; the rest of the
resolution's maps comes from the block of equal size on the way down. Otherwise the number of maps
would explode.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

Order = Literal["norm_first", "conv_first"]


class Style:
    """What layers and transitions are made of.

    Args:
        order: ``norm_first`` is the paper's: norm, ReLU, convolution, dropout, and down by a 1x1
            convolution and max-pooling. ``conv_first`` is that of Kurth et al., SC18: convolution,
            norm, ReLU, dropout, and down by a 1x1 convolution of stride 2. Only there can a norm be
            folded into the convolution before it, for inference.
        kernel: side of the layers' convolutions, odd.
        dropout: probability.
        norm: whether there is batch norm.
    """

    def __init__(self, order: Order, kernel: int, dropout: float, norm: bool) -> None:
        self.order = order
        self.kernel = kernel
        self.dropout = dropout
        self.norm = norm

    def first(self, inputs: int, outputs: int) -> nn.Sequential:
        """What comes before the first block."""
        conv = self._conv(inputs, outputs, self.kernel)
        return self._around(conv) if self.order == "conv_first" else nn.Sequential(conv)

    def layer(self, inputs: int, outputs: int) -> nn.Sequential:
        """A layer of a dense block."""
        return self._around(self._conv(inputs, outputs, self.kernel))

    def down(self, channels: int) -> nn.Sequential:
        """Half the resolution, as many maps."""
        if self.order == "conv_first":
            return self._around(self._conv(channels, channels, 1, stride=2))
        return nn.Sequential(*self._around(self._conv(channels, channels, 1)), nn.MaxPool2d(2))

    def up(self, inputs: int, outputs: int) -> nn.ConvTranspose2d:
        """Twice the resolution."""
        return nn.ConvTranspose2d(inputs, outputs, 3, stride=2, padding=1, output_padding=1)

    def _conv(self, inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
        # A norm right behind has a bias of its own.
        bias = not self.norm or self.order == "norm_first"
        conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=bias)
        nn.init.kaiming_uniform_(conv.weight, nonlinearity="relu")
        return conv

    def _around(self, conv: nn.Conv2d) -> nn.Sequential:
        first = self.order == "norm_first"
        channels = conv.in_channels if first else conv.out_channels
        act: list[nn.Module] = [nn.BatchNorm2d(channels)] if self.norm else []
        act.append(nn.ReLU())
        dropout: list[nn.Module] = [nn.Dropout(self.dropout)] if self.dropout else []
        return nn.Sequential(*([*act, conv] if first else [conv, *act]), *dropout)


class DenseBlock(nn.Module):
    """Layers that each read everything before them.

    Args:
        channels: of the input.
        layers: how many.
        growth: maps that each of them adds.
        style: what a layer is made of.
    """

    def __init__(self, channels: int, layers: int, growth: int, style: Style) -> None:
        super().__init__()
        sizes = range(channels, channels + layers * growth, growth)
        self.layers = nn.ModuleList(style.layer(size, growth) for size in sizes)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return everything, and what is new.

        Args:
            x: [n, channels, height, width].

        Returns:
            [n, channels + layers * growth, height, width] and its last ``layers * growth`` maps.
        """
        new: list[Tensor] = []
        for layer in self.layers:
            new.append(layer(torch.cat([x, *new], 1)))
        fresh = torch.cat(new, 1)
        return torch.cat([x, fresh], 1), fresh


class Tiramisu(nn.Module):
    """Maps images to images of the same size.

    Height and width must be multiples of ``2 ** len(down)``.

    Args:
        channels: of the input.
        outputs: maps of the result, such as one per class.
        down: layers of the dense blocks on the way down, from the full resolution on.
        bottom: layers of the block in the middle.
        up: those on the way up; None for ``down`` reversed.
        growth: maps that a layer adds.
        first: maps of the first convolution.
        kernel: side of the convolutions, odd.
        dropout: probability with which a value is set to zero behind a layer.
        order: of norm and convolution, see `Style`.
        norm: whether there is batch norm.
    """

    def __init__(
        self,
        channels: int,
        outputs: int,
        *,
        down: Sequence[int],
        bottom: int,
        up: Sequence[int] | None = None,
        growth: int,
        first: int,
        kernel: int = 3,
        dropout: float = 0.2,
        order: Order = "norm_first",
        norm: bool = True,
    ) -> None:
        super().__init__()
        style = Style(order, kernel, dropout, norm)
        self.first = style.first(channels, first)
        self.down_blocks, self.downs = nn.ModuleList(), nn.ModuleList()
        self.up_blocks, self.ups = nn.ModuleList(), nn.ModuleList()
        size, skips = first, []
        for layers in down:
            self.down_blocks.append(DenseBlock(size, layers, growth, style))
            size += layers * growth
            skips.append(size)
            self.downs.append(style.down(size))
        self.bottom = DenseBlock(size, bottom, growth, style)
        new = bottom * growth
        for layers, skip in zip(up or down[::-1], reversed(skips), strict=True):
            self.ups.append(style.up(new, new))
            self.up_blocks.append(DenseBlock(new + skip, layers, growth, style))
            size, new = new + skip + layers * growth, layers * growth
        self.head = nn.Conv2d(size, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return maps of the input's size, not normalised.

        Args:
            x: [n, channels, height, width].

        Returns:
            [n, outputs, height, width].
        """
        x = self.first(x)
        skips = []
        for block, down in zip(self.down_blocks, self.downs, strict=True):
            x, _ = block(x)
            skips.append(x)
            x = down(x)
        _, new = self.bottom(x)
        for up, block in zip(self.ups, self.up_blocks, strict=True):
            x, new = block(torch.cat([up(new), skips.pop()], 1))
        logits: Tensor = self.head(x)
        return logits


def jegou_103(channels: int = 3, classes: int = 11) -> Tiramisu:
    """FC-DenseNet103 of Jégou et al., for street scenes."""
    return Tiramisu(channels, classes, down=(4, 5, 7, 10, 12), bottom=15, growth=16, first=48)


def kurth(channels: int = 16, classes: int = 3) -> Tiramisu:
    """The network of Kurth et al., for fields of 768 x 1152 points."""
    return Tiramisu(
        channels,
        classes,
        down=(2, 2, 2, 4),
        bottom=5,
        growth=32,
        first=64,
        kernel=5,
        order="conv_first",
    )
