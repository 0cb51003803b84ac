"""scikit-learn's digits, split at random: 1,344 images of 8x8 pixels to train on, 453 to test."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from graphopt.examples.common import WorkloadError, check_labels, check_tensor
from graphopt.extras import extra

with extra("examples", "this example"):
    from sklearn.datasets import load_digits

TRAIN = 1344  # 42 batches of 32


@dataclass(frozen=True)
class Images:
    """Images (n, 1, 8, 8) with values from 0 to 1, and labels (n,), int64."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Split:
    """What is trained on, and what is tested on."""

    train: Images
    test: Images


def digits(generator: torch.Generator, device: torch.device) -> Split:
    """All images, in a random order."""
    data = load_digits()
    pixels = torch.tensor(data.images, dtype=torch.float32)[:, None] / 16
    return split(pixels, torch.tensor(data.target), generator, device)


def split(
    pixels: Tensor, labels: Tensor, generator: torch.Generator, device: torch.device
) -> Split:
    """The first `TRAIN` images of a random order, and the rest.

    Raises:
        WorkloadError: of another shape, too few, NaN.
    """
    pixels = check_tensor("images", pixels, (None, 1, 8, 8))
    labels = check_labels("labels", labels, (len(pixels),), 10)
    if len(pixels) <= TRAIN:
        raise WorkloadError(
            f"{len(pixels)} images leave none to test on", f"pass more than {TRAIN}"
        )
    order = torch.randperm(len(pixels), generator=generator)
    parts = [
        Images(pixels[part].to(device), labels[part].to(device))
        for part in (order[:TRAIN], order[TRAIN:])
    ]
    return Split(*parts)


class Batches:
    """One pass over the images in a random order: batches of one size, the last may be smaller.

    Raises:
        WorkloadError: a batch is larger than the data.
    """

    def __init__(self, images: Images, size: int, generator: torch.Generator) -> None:
        if not 0 < size <= len(images):
            raise WorkloadError(
                f"a batch of {size} cannot be taken from {len(images)} images",
                "take a smaller batch, of at least 1",
            )
        self._images, self._size = images, size
        self._order = torch.randperm(len(images), generator=generator).to(images.labels.device)

    def __len__(self) -> int:
        return -(-len(self._images) // self._size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for own in self._order.split(self._size):
            yield self._images.pixels[own], self._images.labels[own]
