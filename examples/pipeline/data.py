"""Scikit-learn's digits, to classify, or to find in noise; nothing is downloaded."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from graphopt.extras import extra

with extra("examples", "this example"):
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split


@dataclass(frozen=True)
class Data:
    """Images with classes, to learn from and held out.

    Attributes:
        images: (n, 1, height, width).
        targets: (n,) classes of images, or (n, height, width) classes of pixels.
        unseen: as `images`.
        answers: as `targets`.
    """

    images: Tensor
    targets: Tensor
    unseen: Tensor
    answers: Tensor


def classification() -> Data:
    """Images of 8 x 8 pixels, each of one of ten digits."""
    data = load_digits()
    return _divided(torch.tensor(data.images).float().unsqueeze(1) / 16, torch.tensor(data.target))


def segmentation() -> Data:
    """Images of 16 x 16 pixels, each pixel of a digit (1) or beside it (0), under much noise."""
    small = torch.tensor(load_digits().images).float().unsqueeze(1) / 16
    large = F.interpolate(small, scale_factor=2, mode="bilinear")
    noise = torch.randn(large.shape, generator=torch.Generator().manual_seed(0))
    return _divided(large + 0.5 * noise, (large > 0.5).long().squeeze(1))


def accuracy(output: Tensor, answers: Tensor) -> float:
    """Share of images, or of pixels, whose class is the likeliest one."""
    return (output.argmax(1) == answers).float().mean().item()


def _divided(images: Tensor, targets: Tensor) -> Data:
    train, test = train_test_split(torch.arange(len(images)), test_size=0.2, random_state=0)
    return Data(images[train], targets[train], images[test], targets[test])
