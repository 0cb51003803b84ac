"""The settings SP-NGD was published with, as data.

ResNet-50 on ImageNet; read from the configuration files in github.com/tyohei/chainerkfac
(examples/imagenet/configs). They are starting points: none of them was tuned for anything else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from torch.optim import Optimizer

from graphopt.errors import ArgumentError
from graphopt.optim.schedule import PolynomialDecay


@dataclass(frozen=True)
class SpNgdSettings:
    """One row of the table.

    Attributes:
        batch_size: samples in a step, over all ranks and accumulated micro-batches.
        learning_rate: eta0.
        momentum: m0, of the update.
        damping: lambda of the Kronecker factors; that of normalisations is `norm_damping` times it.
        mixup_alpha: alpha of running mixup.
        power: exponent of the decay.
        start: epoch at which the decay begins.
        end: epoch at which the learning rate would reach 0.
        epochs: epochs trained; less than `end`, so the learning rate never reaches 0.
        norm_damping: factor of `damping` in normalisation layers.
    """

    batch_size: int
    learning_rate: float
    momentum: float
    damping: float
    mixup_alpha: float
    power: float
    start: float
    end: float
    epochs: int
    norm_damping: float = 64.0

    def scheduler(
        self,
        optimizer: Optimizer,
        steps_per_epoch: float,
        *,
        momentum: Literal["proportional", "ratio"] = "proportional",
        buffer: Literal["updates", "gradients"] = "updates",
    ) -> PolynomialDecay:
        """Set learning rate and momentum of all parameter groups to these, and schedule them.

        Args:
            optimizer: one with a momentum.
            steps_per_epoch: optimizer steps in an epoch.
            momentum: how the momentum follows the learning rate, see `PolynomialDecay`.
            buffer: ``"gradients"`` for `torch.optim.SGD`, see `PolynomialDecay`.

        Raises:
            ArgumentError: the optimizer has no momentum, or as `PolynomialDecay`.
        """
        for index, group in enumerate(optimizer.param_groups):
            if "momentum" not in group:
                raise ArgumentError(
                    f"{type(optimizer).__name__} has no momentum, and these settings give one",
                    where=f"parameter group {index}",
                    hint="use torch.optim.SGD, or PolynomialDecay with momentum=None",
                )
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] = self.learning_rate
            group["momentum"] = group["initial_momentum"] = self.momentum
        return PolynomialDecay(
            optimizer,
            start=self.start,
            end=self.end,
            power=self.power,
            steps_per_epoch=steps_per_epoch,
            momentum=momentum,
            buffer=buffer,
        )


def _table() -> Mapping[int, SpNgdSettings]:
    rows = (
        SpNgdSettings(4096, 8.18e-3, 0.997, 2.5e-4, 0.4, 11.0, 1.0, 53.0, 36),
        SpNgdSettings(8192, 1.25e-2, 0.993, 2.5e-4, 0.4, 8.0, 1.0, 53.5, 36),
        SpNgdSettings(16384, 2.5e-2, 0.985, 2.5e-4, 0.4, 8.0, 1.0, 53.5, 36),
        SpNgdSettings(32768, 3e-2, 0.97, 2e-4, 0.6, 3.5, 1.5, 49.5, 46),
        SpNgdSettings(65536, 4e-2, 0.95, 1.5e-4, 0.6, 2.9, 2.0, 64.5, 61),
        SpNgdSettings(131072, 7e-2, 0.93, 1e-4, 1.0, 3.0, 1.0, 95.0, 81),
    )
    return MappingProxyType({row.batch_size: row for row in rows})


SP_NGD = _table()
"""Settings by batch size, 4096 to 131072."""
