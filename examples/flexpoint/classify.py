"""Training of the two classifiers in any format."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import LinearLR

from examples.flexpoint.data import Batch, digits_on_photographs, shifted_digits
from examples.flexpoint.formats import ALL, hold_exponents, prepare, statistics
from examples.flexpoint.models import AlexNet, ResNet

TEST_BATCH, TEST_BATCHES = 180, 2  # the 360 digits that are not trained on


@dataclass
class Run:
    """What one training showed.

    Attributes:
        losses: the training loss of every step; for a GAN, the critic's estimate of the distance.
        test: what was measured afterwards, by name.
        flex: what flexpoint has counted, see `statistics`.
        seconds: of the training.
        models: what was trained.
    """

    losses: list[float] = field(default_factory=list)
    test: dict[str, float] = field(default_factory=dict)
    flex: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    models: tuple[nn.Module, ...] = ()

    @property
    def loss(self) -> float:
        """Mean over the last quarter of the steps; NaN where one of them is."""
        last = self.losses[-max(1, len(self.losses) // 4) :]
        return math.fsum(last) / len(last) if all(map(math.isfinite, last)) else math.nan


@dataclass(frozen=True)
class Classifier:
    """A task: model, batches, and hyperparameters, which were chosen in float32.

    Attributes:
        model: makes the model from PyTorch's global random state.
        batches: of training images from a seed and the size of a batch, or those of the test.
        steps: length of a training; the learning rate falls to 0 in a straight line.
        rate: the first learning rate.
        batch: images in a step.
        momentum: of SGD.
        decay: weight decay.
        smoothing: of the labels.
    """

    model: Callable[[], nn.Module]
    batches: Callable[..., Iterator[Batch]]
    steps: int
    rate: float
    batch: int = 64
    momentum: float = 0.9
    decay: float = 5e-4
    smoothing: float = 0.1

    def train(self, format: str, seed: int, steps: int | None = None) -> Run:
        """One training.

        Args:
            format: one of `ALL`.
            seed: of the weights, the batches and dropout.
            steps: stop after so many; the schedule stays that of the whole training.
        """
        chosen = ALL[format]
        torch.manual_seed(seed)
        model = self.model().train()
        optimizer = SGD(
            model.parameters(), self.rate, momentum=self.momentum, weight_decay=self.decay
        )
        schedule = LinearLR(optimizer, 1.0, 0.0, total_iters=self.steps)
        batches = self.batches(seed, self.batch)
        images, labels = next(batches)
        prepare(model, chosen, images)
        torch.manual_seed(seed)
        run = Run(models=(model,))
        start = time.perf_counter()
        for _ in range(min(steps or self.steps, self.steps)):
            hold_exponents(model, chosen)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), labels, label_smoothing=self.smoothing)
            loss.backward()
            optimizer.step()
            schedule.step()
            run.losses.append(loss.item())
            images, labels = next(batches)
        run.seconds = time.perf_counter() - start
        run.flex = statistics(model)
        run.test = self._test(model)
        return run

    def _test(self, model: nn.Module) -> dict[str, float]:
        """Cross entropy and share of errors on the digits of the test."""
        model.eval()
        loss, right, count = 0.0, 0, 0
        with torch.no_grad():
            for images, labels in islice(self.batches(0, TEST_BATCH, unseen=True), TEST_BATCHES):
                logits = model(images)
                loss += F.cross_entropy(logits, labels, reduction="sum").item()
                right += int((logits.argmax(1) == labels).sum())
                count += len(labels)
        model.train()
        return {"loss": loss / count, "error": 1 - right / count}


ALEXNET = Classifier(AlexNet, shifted_digits, steps=400, rate=0.01)
RESNET = Classifier(ResNet, digits_on_photographs, steps=300, rate=0.02)
