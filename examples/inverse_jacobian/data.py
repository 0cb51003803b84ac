"""Handwritten digits behind a random operator with fewer measurements than pixels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from graphopt.examples.common import WorkloadError, check_count, check_tensor

PIXELS = 64
MEASUREMENTS = 16
NOISE = 0.05
VALIDATION = 300


@dataclass(frozen=True)
class Pairs:
    """Images (n, 64) with values in [0, 1], and their measurements (n, 16)."""

    images: Tensor
    measured: Tensor


@dataclass(frozen=True)
class Problem:
    """An operator (16, 64) and pairs that share no image."""

    operator: Tensor
    training: Pairs
    validation: Pairs
    test: Pairs


def load_images() -> Tensor:
    """The 1,797 digits of scikit-learn, 8x8 pixels each, as rows with values in [0, 1]."""
    from sklearn.datasets import load_digits

    return check_images(torch.from_numpy(load_digits().data).float() / 16)


def check_images(images: Tensor) -> Tensor:
    """Return the images if they are (n, 64), finite and within [0, 1].

    Raises:
        WorkloadError: they are not.
    """
    check_tensor("images", images, (None, PIXELS))
    if images.min() < 0 or images.max() > 1:
        raise WorkloadError("images have values outside of [0, 1]", "divide them by their maximum")
    return images


def make_problem(images: Tensor, count: int, generator: torch.Generator) -> Problem:
    """Draw operator, noise and split; ``count`` images to train on, what is left over to test on.

    Draws of different ``count`` from equal generators share operator, noise and test images, and
    the smaller training set is part of the larger one.
    """
    check_images(images)
    largest = len(images) // 4
    if len(images) - largest <= VALIDATION:
        raise WorkloadError(
            f"{len(images)} images leave none to test on", f"take {4 * VALIDATION} or more"
        )
    check_count(f"training images of {len(images)}", count, at_most=largest)
    operator = torch.randn(MEASUREMENTS, PIXELS, generator=generator) / MEASUREMENTS**0.5
    noise = NOISE * torch.randn(len(images), MEASUREMENTS, generator=generator)
    order = torch.randperm(len(images), generator=generator)

    def take(chosen: Tensor) -> Pairs:
        return Pairs(images[chosen], images[chosen] @ operator.T + noise[chosen])

    return Problem(
        operator,
        take(order[:count]),
        take(order[largest : largest + VALIDATION]),
        take(order[largest + VALIDATION :]),
    )
