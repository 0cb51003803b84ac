"""Delays of pipelined backpropagation, and settings that follow from them.

Kosson et al., arXiv 2003.11666. A pipeline that is never drained applies the gradient of stage s
some updates after the forward that it belongs to. How many depends on how a device takes turns;
the two laws differ by a factor of two and have a function each. Stages count from 0; the last one
has no delay.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from graphopt.errors import ArgumentError


def pipelined_delay(stage: int, stages: int) -> int:
    """``2 * (stages - 1 - stage)`` updates: a forward and a backward of every stage per time step.

    That of Kosson et al.: forward and backward of a stage run side by side, on different samples,
    and every time step ends with an update.

    Raises:
        ArgumentError: there is no such stage.
    """
    return 2 * alternating_delay(stage, stages)


def alternating_delay(stage: int, stages: int) -> int:
    """``stages - 1 - stage`` updates: each device alternates between a forward and a backward.

    That of 1F1B without a flush (Narayanan et al., PipeDream, SOSP 2019): only the samples in
    flight count.

    Raises:
        ArgumentError: there is no such stage.
    """
    if not 0 <= stage < stages:
        raise ArgumentError(
            f"a pipeline of {stages} stages has no stage {stage}",
            hint="count stages from 0 to stages - 1",
        )
    return stages - 1 - stage


def accumulated_delay(delay: int, accumulate: int) -> int:
    """Updates that pass while `delay` micro-batches do, if `accumulate` of them make one update.

    Rounded up: the most that a micro-batch of the group sees.

    Raises:
        ArgumentError: `delay` is negative, or `accumulate` is not positive.
    """
    if delay < 0 or accumulate < 1:
        raise ArgumentError(
            f"delay={delay} with accumulate={accumulate} is impossible",
            hint="pass a delay of 0 or more micro-batches, and 1 or more of them per update",
        )
    return -(-delay // accumulate)


class Rates(NamedTuple):
    """Learning rate and momentum."""

    lr: float
    momentum: float


def scale_to_batch(lr: float, momentum: float, *, tuned: int, batch: int) -> Rates:
    """Learning rate and momentum for batches of `batch`, from those tuned for `tuned` samples.

    ``m = m_r ** (N / N_r)`` and ``lr = lr_r * (1 - m) * N / ((1 - m_r) * N_r)``. Both the half-life
    of the momentum, in samples, and the total weight of a sample's gradient, ``lr / ((1 - m) N)``,
    stay what they were. Weight decay stays unchanged. The convention is that of `torch.optim.SGD`:
    the buffer sums gradients, and the loss is the mean over the batch.

    Args:
        lr: learning rate at batch size `tuned`.
        momentum: at batch size `tuned`, 0 to below 1.
        tuned: samples per update for which they were chosen.
        batch: samples per update to come; the micro-batch where each is an update.

    Raises:
        ArgumentError: a number is out of range.
    """
    if not (lr >= 0 and math.isfinite(lr) and 0 <= momentum < 1 and tuned >= 1 and batch >= 1):
        raise ArgumentError(
            f"lr={lr}, momentum={momentum}, tuned={tuned}, batch={batch} are out of range",
            hint="pass lr >= 0, 0 <= momentum < 1 and batch sizes of at least 1",
        )
    scaled = momentum ** (batch / tuned)
    return Rates(lr * (1 - scaled) * batch / ((1 - momentum) * tuned), scaled)


class Compensation(NamedTuple):
    """``w' = w - lr * (velocity * v' + gradient * g)``: the two factors, a and b in the paper."""

    velocity: float
    gradient: float


def spike_compensation(momentum: float, delay: float) -> Compensation:
    """Factors of SC_delay: ``a = m ** D`` and ``b = (1 - m ** D) / (1 - m)``.

    The first step of a late gradient is as large as all steps that it missed, and its total
    contribution stays ``1 / (1 - m)``. SC_0 is SGD with momentum, SC_1 is Nesterov's. A delay
    larger than the real one overcompensates (the paper's SC_2D).

    Args:
        momentum: 0 to below 1.
        delay: in updates, at least 0.

    Raises:
        ArgumentError: a number is out of range.
    """
    if not (0 <= momentum < 1 and 0 <= delay < math.inf):
        raise ArgumentError(
            f"there is no compensation for momentum={momentum} and delay={delay}",
            hint="pass 0 <= momentum < 1 and a delay of 0 or more updates",
        )
    power = momentum**delay
    return Compensation(power, (1 - power) / (1 - momentum))
