"""A small convolutional network, and K workers that are simulated by copies of it."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def network(*, batch_norm: bool = True) -> nn.Module:
    """A classifier of digits: (examples, 1, 8, 8) to (examples, 10).

    Args:
        batch_norm: batch normalisation; otherwise groups of channels of single examples are
            normalised, so that the gradient of a batch is the mean of its parts' gradients.
    """

    def norm(channels: int) -> nn.Module:
        return nn.BatchNorm2d(channels) if batch_norm else nn.GroupNorm(4, channels)

    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        norm(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, stride=2, bias=False),
        norm(32),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 10),
    )


@torch.no_grad()
def accuracy(model: nn.Module, pixels: Tensor, labels: Tensor) -> float:
    """Percent of the images that get their label; leaves the model in training mode."""
    model.eval()
    right = (model(pixels).argmax(1) == labels).double().mean()
    model.train()
    return 100 * float(right)


class Workers:
    """K copies of a model that each see a part of a batch, and average their gradients.

    Args:
        model: gets the mean gradient, and is what the copies are made of.
        count: K.
    """

    def __init__(self, model: nn.Module, count: int) -> None:
        self._model = model
        self._copies = [copy.deepcopy(model) for _ in range(count)]

    def backward(self, pixels: Tensor, labels: Tensor) -> None:
        """Put the gradient of one batch into ``.grad`` of the model's parameters.

        Args:
            pixels: (n, 1, 8, 8), n a multiple of K.
            labels: (n,).
        """
        state = self._model.state_dict()
        parts = zip(pixels.chunk(len(self._copies)), labels.chunk(len(self._copies)), strict=True)
        for own, (images, targets) in zip(self._copies, parts, strict=True):
            own.load_state_dict(state)
            own.zero_grad()
            F.cross_entropy(own(images), targets).backward()
        gradients = zip(*(own.parameters() for own in self._copies), strict=True)
        for mean, each in zip(self._model.parameters(), gradients, strict=True):
            mean.grad = torch.stack([p.grad for p in each]).mean(0)
