"""The learning rate of large batches: in proportion to the batch, and half of that at first.

Akiba et al., arXiv 1711.04325: with n workers of b examples each, ``eta = 0.1 n b / 256``; over 90
epochs the learning rate is 0.5 eta for 40, 0.075 eta for 30, 0.01 eta for 15 and 0.001 eta for 5.
"""

from __future__ import annotations

import math

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from graphopt.errors import ArgumentError

# Ends of the stages, in 90ths of the training, and their factors.
_STAGES = ((40, 0.5), (70, 0.075), (85, 0.01), (90, 0.001))


def linear_scaling(examples: int, *, rate: float = 0.1, reference: int = 256) -> float:
    """The learning rate in proportion to the batch.

    Args:
        examples: in one optimizer step, over all ranks and accumulated micro-batches, at least 1.
        rate: learning rate that suits batches of `reference`, at least 0.
        reference: examples, at least 1.

    Raises:
        ArgumentError: a number is out of range.
    """
    if examples < 1 or reference < 1 or not 0 <= rate < math.inf:
        raise ArgumentError(
            f"rate={rate} at {reference} examples cannot be scaled to {examples}",
            hint="pass batches of at least 1, and a rate that is finite and not negative",
        )
    return rate * examples / reference


def slow_start(epoch: float, epochs: float = 90.0) -> float:
    """The factor of the learning rate at `epoch`: 0.5, 0.075, 0.01, then 0.001.

    Args:
        epoch: epochs done so far, with a fraction, at least 0; those past the end keep the last
            factor.
        epochs: length of the training, above 0; the stages are 4/9, 3/9, 1.5/9 and 0.5/9 of it.

    Raises:
        ArgumentError: a number is out of range.
    """
    if not (epoch >= 0 and 0 < epochs < math.inf):
        raise ArgumentError(
            f"epoch {epoch} of {epochs} is impossible",
            hint="pass 0 <= epoch and a length above 0, in epochs",
        )
    for end, factor in _STAGES:
        if 90 * epoch < end * epochs:
            return factor
    return _STAGES[-1][1]


class SlowStart(LRScheduler):
    """Sets the learning rate of `slow_start` once a step; call `step` after `optimizer.step()`.

    Args:
        optimizer: what to schedule; the learning rates it was made with are eta.
        steps_per_epoch: optimizer steps in an epoch, above 0; need not be whole.
        epochs: length of the training, above 0.
        last_epoch: number of the last step of a run that is resumed without `load_state_dict`.

    Raises:
        ArgumentError: a number is out of range.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        steps_per_epoch: float,
        epochs: float = 90.0,
        last_epoch: int = -1,
    ) -> None:
        slow_start(0.0, epochs)  # refuses what is out of range
        if not 0 < steps_per_epoch < math.inf:
            raise ArgumentError(
                f"steps_per_epoch={steps_per_epoch} is not positive",
                hint="pass the number of optimizer steps in one pass over the data",
            )
        self.steps_per_epoch = steps_per_epoch
        self.epochs = epochs
        super().__init__(optimizer, last_epoch)

    def get_lr(self) -> list[float | Tensor]:
        """One learning rate per parameter group, for the step to come."""
        factor = slow_start(self.last_epoch / self.steps_per_epoch, self.epochs)
        return [base * factor for base in self.base_lrs]
