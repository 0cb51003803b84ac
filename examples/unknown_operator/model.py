"""A U-net in one dimension, on a circle."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Convolutions(nn.Sequential):
    """Two circular convolutions of width 5, each with a GELU.

    Args:
        inputs: channels that come in.
        outputs: channels that go out.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        def layer(incoming: int) -> nn.Conv1d:
            made = nn.Conv1d(incoming, outputs, 5, padding=2, padding_mode="circular")
            # PyTorch's own start shrinks signals from layer to layer; some nets then stay linear.
            nn.init.kaiming_normal_(made.weight, nonlinearity="relu")
            assert made.bias is not None
            nn.init.zeros_(made.bias)
            return made

        super().__init__(layer(inputs), nn.GELU(), layer(outputs), nn.GELU())


class UNet(nn.Module):
    """Averages of halves on the way down, as the scaling coefficients of Haar wavelets are.

    On the way up each scale is joined with what was kept of the next finer one, as wavelet
    coefficients are; what is learnt is how to shrink and deblur them, the same at all places.

    Args:
        channels: at every scale.
        levels: how many scales.
    """

    def __init__(self, channels: int = 12, levels: int = 4) -> None:
        super().__init__()
        self.down = nn.ModuleList(
            Convolutions(1 if level == 0 else channels, channels) for level in range(levels)
        )
        self.up = nn.ModuleList(Convolutions(2 * channels, channels) for _ in range(levels - 1))
        self.head = nn.Conv1d(channels, 1, 1)

    def forward(self, observed: Tensor) -> Tensor:
        """Estimate f from T f + noise.

        Args:
            observed: shape [batch, 1, points], points divisible by 2^(levels - 1).

        Returns:
            Of the same shape.
        """
        kept = []
        x = observed
        for level, block in enumerate(self.down):
            x = block(x if level == 0 else F.avg_pool1d(x, 2))
            kept.append(x)
        kept.pop()
        for block in self.up:
            x = block(torch.cat([F.interpolate(x, scale_factor=2.0), kept.pop()], 1))
        estimate: Tensor = self.head(x)
        return estimate
