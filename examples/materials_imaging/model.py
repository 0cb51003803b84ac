"""FC-DenseNet for reconstructing what an electron beam went through.

Laanait et al., arXiv 1909.11150. The network is the Tiramisu of Jégou et al. without batch norm,
with wide convolutions; a stack of diffraction patterns goes in, one map per scan position, and the
projected potential comes out. Configurations follow the public code, github.com/nlaanait/stemdl.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from graphopt.examples.climate_segmentation.tiramisu import Tiramisu
from graphopt.examples.materials_imaging.data import POSITIONS

HUBER = 0.1  # radians: larger errors count linearly


def small_net() -> Tiramisu:
    """For 16 patterns of 32 x 32 pixels."""
    return Tiramisu(
        POSITIONS,
        1,
        down=(2, 2),
        bottom=3,
        growth=12,
        first=24,
        kernel=5,
        dropout=0.0,
        norm=False,
    )


def published_net(channels: int = 16) -> Tiramisu:
    """Laanait et al.'s variant of FC-DenseNet103, for patterns of 512 x 512 pixels."""
    return Tiramisu(
        channels,
        1,
        down=(2, 2, 2, 4, 5),
        bottom=5,
        up=(5, 4, 2, 2, 2),
        growth=32,
        first=48,
        kernel=5,
        norm=False,
    )


def huber_loss(predicted: Tensor, potential: Tensor) -> Tensor:
    """``e^2 / (2 beta)`` for errors below beta = 0.1 radians, ``|e| - beta / 2`` above; the mean.

    Args:
        predicted: [n, 1, height, width], radians.
        potential: the same.
    """
    return F.smooth_l1_loss(predicted, potential, beta=HUBER)


def relative_error(predicted: Tensor, potential: Tensor, mean: float) -> float:
    """``|predicted - potential| / |potential - mean|``: 1 for predicting the mean everywhere.

    Args:
        predicted: [n, 1, height, width], radians.
        potential: the same.
        mean: of the potential in training.
    """
    return float((predicted - potential).norm() / (potential - mean).norm())


@torch.no_grad()
def predict(model: nn.Module, patterns: Tensor, batch: int = 16) -> Tensor:
    """Potentials of all specimens, [n, 1, height, width], in evaluation mode."""
    training = model.training
    model.eval()
    found = [model(part) for part in torch.split(patterns, batch)]
    model.train(training)
    return torch.cat(found)
