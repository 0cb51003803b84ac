"""Batch norms that average over all batches so far: ``BatchNorm(momentum=None)``.

`torch.optim.swa_utils.update_bn` sets it on every batch norm while it runs. The factor is one over
a buffer, hence a number that depends on data, and the operator takes no such number.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast
from unittest import mock

import torch
from torch import Tensor

from graphopt.ops import statistics  # noqa: F401


@contextmanager
def cumulative_averages() -> Iterator[None]:
    """While Dynamo captures, and while the backward is derived."""
    original = torch.batch_norm

    def batch_norm(
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor | None,
        var: Tensor | None,
        training: bool,
        momentum: Any,
        eps: float,
        cudnn: bool,
    ) -> Tensor:
        if not isinstance(momentum, torch.SymFloat):
            return original(x, weight, bias, mean, var, training, momentum, eps, cudnn)
        if mean is not None and var is not None:
            factor = torch.scalar_tensor(cast("float", momentum), dtype=torch.float64)
            with torch.no_grad():
                update = torch.ops.graphopt.batch_norm_statistics.default
                new_mean, new_var = update(x.detach(), mean, var, factor)
                mean.copy_(new_mean)
                var.copy_(new_var)
        return original(x, weight, bias, None, None, training, 0.0, eps, cudnn)

    with mock.patch.object(torch, "batch_norm", batch_norm):
        yield
