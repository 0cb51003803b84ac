"""One training of the study: a recipe, what it came to, and how it is run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from graphopt.examples.common import Run
from graphopt.examples.large_batch.data import Batches, Split
from graphopt.examples.large_batch.model import accuracy
from graphopt.optim import BatchSchedule, Change, RMSpropWarmup, SlowStart, slow_start

MICRO = 32  # examples in a micro-batch, over which BatchNorm takes its statistics
DECAY = 5e-4  # of the weights


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Attributes:
        name: unique.
        rate: learning rate, before its schedule.
        epochs: passes over the data.
        batch: makes the schedule of the batch size.
        micro: examples in a micro-batch.
        warmup: center and period of RMSprop's way to SGD, in epochs; SGD from the start without.
        schedule: the factor of the learning rate by the epoch and the length.
    """

    name: str
    rate: float
    epochs: int
    batch: Callable[[nn.Module], BatchSchedule]
    micro: int = MICRO
    warmup: tuple[float, float] | None = None
    schedule: Callable[[float, float], float] | None = slow_start


def fixed(examples: int) -> Callable[[nn.Module], BatchSchedule]:
    """A batch of that many examples, a multiple of `MICRO`."""
    parts = examples // MICRO
    return lambda model: BatchSchedule(
        model, smallest=parts, largest=parts, double_every=1, rounding="whole"
    )


def gradual(epoch: float, epochs: float) -> float:
    """`slow_start`, and before that a straight rise from 0 over the first tenth of the training."""
    return slow_start(epoch, epochs) * min(1.0, 10 * epoch / epochs)


@dataclass(frozen=True)
class Outcome:
    """What one training came to.

    Attributes:
        accuracy: on the test images, percent.
        updates: optimizer steps.
        losses: means over each epoch.
        changes: of the batch size.
        noise: the noise scale at the end, examples; None if it was not measured.
    """

    accuracy: float
    updates: int
    losses: Sequence[float]
    changes: Sequence[Change]
    noise: float | None


def train(run: Run, name: str, recipe: Recipe, model: nn.Module, split: Split) -> Outcome:
    """Train ``model`` as it stands.

    Args:
        run: says where and with which seed.
        name: unique in the run; batches are drawn from it and from the seed.
        recipe: what to do.
        model: in training mode.
        split: the data.
    """
    batch = recipe.batch(model)
    updates = -(-len(split.train) // (recipe.micro * batch.micro_batches))
    optimizer = _optimizer(recipe, model, updates)
    scheduler = _scheduler(recipe, optimizer, updates)
    stream = 1000 * sum(name.encode())

    def epoch(number: int) -> Tensor:
        loader = Batches(split.train, recipe.micro, run.generator(stream + number))
        losses = []
        for step in batch.steps(loader):
            optimizer.zero_grad()
            for pixels, labels in step:
                loss = F.cross_entropy(model(pixels), labels)
                step.backward(loss)
                losses.append(loss.detach())
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
        return torch.stack(losses).mean()

    parts: list[Any] = [model, optimizer, batch]
    if scheduler is not None:
        parts.append(scheduler)
    losses = run.loop(name, parts, epoch, recipe.epochs)
    right = accuracy(model, split.test.pixels, split.test.labels)
    noise = batch.noise_scale
    return Outcome(right, batch.steps_done, losses, list(batch.changes), noise)


def _optimizer(recipe: Recipe, model: nn.Module, updates: int) -> Optimizer:
    if recipe.warmup is None:
        return torch.optim.SGD(model.parameters(), recipe.rate, momentum=0.9, weight_decay=DECAY)
    center, period = recipe.warmup
    return RMSpropWarmup(
        model.parameters(),
        recipe.rate,
        steps_per_epoch=updates,
        rms_lr=3e-3,
        center=center,
        period=period,
        weight_decay=DECAY,
    )


def _scheduler(recipe: Recipe, optimizer: Optimizer, updates: int) -> LRScheduler | None:
    factor = recipe.schedule
    if factor is None:
        return None
    if factor is slow_start:
        return SlowStart(optimizer, steps_per_epoch=updates, epochs=recipe.epochs)
    # A step of rate 0 would be lost, so the rise begins with its first step done.
    return LambdaLR(optimizer, lambda step: factor((step + 1) / updates, recipe.epochs))
