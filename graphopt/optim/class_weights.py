"""Weights of classes for losses over many points, where some classes are rare."""

from __future__ import annotations

import torch
from torch import Tensor

from graphopt.errors import ArgumentError


def frequency_weights(labels: Tensor, classes: int, *, power: float = 0.5) -> Tensor:
    """``w_c = f_c ** -power``, where f_c is the share of class c, with a mean of 1 over all points.

    With a power of 1 all classes count alike, however rare, and with 0 all points do. In between,
    Kurth et al., SC18, take ``1 / sqrt(f)`` for the segmentation of climate data: ``1 / f`` was
    unstable in float16 and led to false positives.

    Args:
        labels: of all points, integers from 0 to below `classes`, of any shape.
        classes: how many there are, at least 2.
        power: 0 to 1.

    Returns:
        [classes], float32, on the device of the labels, for ``F.cross_entropy(…, weight,
        reduction="none").mean()``; its own mean would divide by the weights of each batch.

    Raises:
        ArgumentError: labels are missing or out of range, or a class has no point.
    """
    if classes < 2 or not 0 <= power <= 1:
        raise ArgumentError(
            f"there are no weights of {classes} classes with a power of {power}",
            hint="pass two classes or more, and a power of 0 to 1",
        )
    if labels.is_floating_point() or labels.is_complex() or not labels.numel():
        raise ArgumentError(
            f"labels are {tuple(labels.shape)} numbers of {labels.dtype}",
            hint="pass the integer labels of all training points",
        )
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= classes:
        raise ArgumentError(
            f"labels go from {low} to {high}, and there are {classes} classes",
            hint="leave out the points that are not labelled: labels[labels >= 0]",
        )
    counts = torch.bincount(labels.flatten(), minlength=classes)
    missing = [c for c, count in enumerate(counts.tolist()) if not count]
    if len(missing) == classes - 1:
        raise ArgumentError(
            f"all points are of class {low}, so there is nothing to tell apart",
            hint="count over the whole training set, not over one batch",
        )
    if missing:
        raise ArgumentError(
            f"class {missing[0]} has no point, so its weight would be infinite",
            hint="count over the whole training set, or leave the class out",
        )
    frequencies = counts / labels.numel()
    weights = frequencies**-power
    return weights / (weights * frequencies).sum()
