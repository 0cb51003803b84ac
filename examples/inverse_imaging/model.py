r"""Networks for y = A x + noise that use A in different ways.

`UNet` learns x from A^T y for the one A of its training. `MoDL` unrolls

    x <- (A^T A + lambda I)^{-1} (A^T y + lambda D(x))

with one denoiser D and one lambda for all steps, the inverse by conjugate gradients; A is an input.
Transfer functions are complex (height, width // 2 + 1), masks (height, width), pictures
(batch, 1, height, width) in [0, 1].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphopt.examples.inverse_imaging.operators import adjoint, conjugate_gradients, observe


class Denoiser(nn.Module):
    """Convolutions that predict the noise of a picture.

    Args:
        channels: of the hidden layers.
        layers: convolutions, at least two.
    """

    def __init__(self, channels: int = 24, layers: int = 4) -> None:
        super().__init__()
        parts: list[nn.Module] = [nn.Conv2d(1, channels, 3, padding=1), nn.ReLU()]
        for _ in range(layers - 2):
            parts += [nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU()]
        self.noise = nn.Sequential(*parts, nn.Conv2d(channels, 1, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        cleaned: Tensor = x - self.noise(x)
        return cleaned


class MoDL(nn.Module):
    """Unrolled alternation of a denoiser and of data consistency.

    Args:
        denoiser: shared by all steps.
        steps: how many.
        iterations: of conjugate gradients, per step.
        weight: lambda before training.
    """

    def __init__(
        self, denoiser: nn.Module, steps: int = 5, iterations: int = 6, weight: float = 0.2
    ) -> None:
        super().__init__()
        self.denoiser, self.steps, self.iterations = denoiser, steps, iterations
        self.log_weight = nn.Parameter(torch.tensor(weight).log())

    def forward(self, y: Tensor, transfer: Tensor, mask: Tensor) -> Tensor:
        weight = self.log_weight.exp()

        def normal(x: Tensor) -> Tensor:
            return adjoint(observe(x, transfer, mask), transfer, mask) + weight * x

        back = adjoint(y, transfer, mask)
        x = conjugate_gradients(normal, back, torch.zeros_like(back), self.iterations)
        for _ in range(self.steps):
            x = conjugate_gradients(normal, back + weight * self.denoiser(x), x, self.iterations)
        return x


class UNet(nn.Module):
    """Two times down and up, with skips; adds its output to its first input channel.

    Args:
        channels: at full resolution.
        inputs: channels of the input.
        residual: whether the output is added to the input.
    """

    def __init__(self, channels: int = 24, inputs: int = 1, residual: bool = True) -> None:
        super().__init__()
        self.residual = residual
        self.enter = _block(inputs, channels)
        self.down = _block(channels, 2 * channels)
        self.bottom = _block(2 * channels, 4 * channels)
        self.up = _block(6 * channels, 2 * channels)
        self.leave = _block(3 * channels, channels)
        self.last = nn.Conv2d(channels, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        full = self.enter(x)
        half = self.down(F.max_pool2d(full, 2))
        low = self.bottom(F.max_pool2d(half, 2))
        half = self.up(torch.cat([half, _twice(low)], 1))
        full = self.leave(torch.cat([full, _twice(half)], 1))
        found: Tensor = self.last(full)
        return x[:, :1] + found if self.residual else found


class BackProjectionUNet(nn.Module):
    """A U-Net on A^T y, scaled to the mean of the mask."""

    def __init__(self, channels: int = 24) -> None:
        super().__init__()
        self.unet = UNet(channels)

    def forward(self, y: Tensor, transfer: Tensor, mask: Tensor) -> Tensor:
        found: Tensor = self.unet(adjoint(y, transfer, mask) / mask.mean())
        return found


class DeepImagePrior(nn.Module):
    """A of a U-Net's picture for a fixed random input: what is fitted to one y.

    Args:
        channels: of the U-Net, and of its input.
    """

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.unet = UNet(channels, channels, residual=False)

    def picture(self, z: Tensor) -> Tensor:
        """The reconstruction for the input z (1, channels, height, width)."""
        return torch.sigmoid(self.unet(z))

    def forward(self, z: Tensor, transfer: Tensor, mask: Tensor) -> Tensor:
        return observe(self.picture(z), transfer, mask)


def _block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(outputs, outputs, 3, padding=1),
        nn.ReLU(),
    )


def _twice(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest")
