"""The networks of the workload, at the size that two cores can train, and their weighted loss."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphopt.examples.climate_segmentation.data import CHANNELS, CLASSES
from graphopt.examples.climate_segmentation.deeplab import DeepLab
from graphopt.examples.climate_segmentation.tiramisu import Order, Tiramisu, kurth
from graphopt.optim import frequency_weights

Weighting = Literal["none", "1/sqrt(f)", "1/f"]


def small_tiramisu(order: Order = "conv_first") -> Tiramisu:
    """The Tiramisu for fields of 48 x 72 points."""
    return Tiramisu(
        len(CHANNELS),
        len(CLASSES),
        down=(2, 2),
        bottom=2,
        growth=8,
        first=16,
        kernel=5,
        dropout=0.0,
        order=order,
    )


def small_deeplab() -> DeepLab:
    """DeepLabv3+ for fields of 48 x 72 points: an encoder at 1/8 sees 6 x 9."""
    return DeepLab(
        len(CHANNELS),
        len(CLASSES),
        width=8,
        units=(1, 1, 1, 1),
        rates=(1, 2, 4),
        depth=16,
        low=8,
        full=(16, 16),
    )


def class_weights(labels: Tensor, weighting: Weighting) -> Tensor:
    """Weights of the classes for the loss, with a mean of 1 over all points.

    Args:
        labels: [n, height, width], integers.
        weighting: ``1/f`` makes all classes count alike, however rare; ``1/sqrt(f)`` lies between
            that and no weights.

    Returns:
        [classes], float32.
    """
    power = {"none": 0.0, "1/sqrt(f)": 0.5, "1/f": 1.0}[weighting]
    return frequency_weights(labels, len(CLASSES), power=power)


def weighted_loss(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Mean over all points of ``-w_c log softmax(logits)_c`` with c the label.

    Args:
        logits: [n, classes, height, width].
        labels: [n, height, width], integers.
        weights: [classes].

    Returns:
        A scalar.
    """
    # Its own mean would divide by the weights of this batch's labels.
    return F.cross_entropy(logits, labels, weights, reduction="none").mean()


def published() -> tuple[nn.Module, tuple[Tensor]]:
    """The Tiramisu of Kurth et al. and one of their fields, for ``graphopt simulate``."""
    return kurth(), (torch.zeros(1, 16, 768, 1152),)
