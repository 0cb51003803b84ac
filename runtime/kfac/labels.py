"""Gradients of the loss for labels that the model itself would give: Fisher instead of empirical.

With the loss L of one example and outputs z, the Fisher matrix of z is ``E_y[∂L ∂Lᵀ]`` for labels y
drawn from the model. ``mc`` draws one; ``type2`` gives columns of its square root, so that the sum
over them is exact (Martens, arXiv 1412.1193, section 9).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from graphopt.plan.kfac import Curvature


def tangents_of_labels(curvature: Curvature, output: Tensor) -> Iterator[Tensor]:
    """Tangents of the model's output, as a loss with this reduction would give them.

    Args:
        curvature: `fisher`, `loss` and `reduction`.
        output: logits ``[n, classes]`` or ``[n, classes, ...]`` as `torch.nn.functional
            .cross_entropy` takes them, or means ``[n, ...]``.
    """
    positions = output.numel() // output.shape[0]
    if curvature.loss == "cross_entropy":
        positions //= output.shape[1]
        columns = _classes(curvature.fisher, output, positions)
        weight = 1.0
    else:
        # `mse_loss` divides by all elements; its second derivative by one of them is 2.
        columns = _means(curvature.fisher, output)
        weight = 2.0**0.5 / (positions if curvature.reduction == "mean" else 1) ** 0.5
    # A mean over positions weighs each by their number, a sum by one.
    mean = curvature.reduction == "mean"
    shared = positions if mean and curvature.loss == "cross_entropy" else 1
    examples = output.shape[0] if mean else 1
    for column in columns:
        yield column * (weight / (examples * shared))


def _classes(fisher: str, logits: Tensor, positions: int) -> Iterator[Tensor]:
    """Gradients of cross entropy by the logits.

    Labels of several positions of an example are independent; random signs keep their columns so,
    on average.
    """
    p = logits.softmax(1)
    if fisher == "mc":
        flat = p.movedim(1, -1).reshape(-1, p.shape[1])
        drawn = torch.multinomial(flat, 1)
        label = torch.zeros_like(flat).scatter_(1, drawn, 1.0)
        label = label.reshape(p.movedim(1, -1).shape).movedim(-1, 1)
        yield p - label
        return
    for c in range(p.shape[1]):
        # Column c of (diag(√p) - p √pᵀ), whose product with its transpose is diag(p) - p pᵀ.
        root = p[:, c : c + 1].sqrt()
        column = -p * root
        column[:, c : c + 1] += root
        if positions > 1:
            column = column * (torch.rand_like(root) < 0.5).to(root).mul_(2).sub_(1)
        yield column


def _means(fisher: str, means: Tensor) -> Iterator[Tensor]:
    """Gradients of half the squared error by the means, for targets of variance one."""
    if fisher == "mc":
        yield torch.randn_like(means)
        return
    flat = means.reshape(means.shape[0], -1)
    for index in range(flat.shape[1]):
        column = torch.zeros_like(flat)
        column[:, index] = 1.0
        yield column.view_as(means)
