"""scikit-learn's digits: 1,797 images of 8x8 pixels."""

from __future__ import annotations

import torch
from torch import Tensor

from graphopt.examples.common import check_labels, check_tensor
from graphopt.extras import extra

with extra("examples", "this example"):
    from sklearn.datasets import load_digits


def digits() -> tuple[Tensor, Tensor]:
    """All images, (1797, 64) with values from 0 to 1, and their labels, (1797,) int64."""
    data = load_digits()
    return checked(torch.tensor(data.data, dtype=torch.float32) / 16, torch.tensor(data.target))


def checked(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The same, if they can be trained on.

    Raises:
        WorkloadError: empty, of another shape, NaN.
    """
    images = check_tensor("images", images, (None, 64))
    return images, check_labels("labels", labels, (len(images),), 10)
