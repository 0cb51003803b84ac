"""`graphopt::batch_norm_statistics`: the running statistics of a batch norm after one more batch.

The factor of the batch is a tensor, because ``BatchNorm(momentum=None)`` computes it from the count
of batches so far, and operators of PyTorch take a number that is known while a graph is traced.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Typed `Any` because torch leaves the methods of `Library` untyped.
_library: Any = torch.library.Library("graphopt", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(
    "batch_norm_statistics(Tensor x, Tensor mean, Tensor var, Tensor factor) -> (Tensor, Tensor)"
)


def _batch_norm_statistics(
    x: Tensor, mean: Tensor, var: Tensor, factor: Tensor
) -> tuple[Tensor, Tensor]:
    # PyTorch's own kernel, so that they are rounded as it rounds them.
    statistics = mean.clone(), var.clone()
    torch.ops.aten.native_batch_norm.default(x, None, None, *statistics, True, float(factor), 1e-5)
    return statistics


def _like(x: Tensor, mean: Tensor, var: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(mean), torch.empty_like(var)


_library.impl("batch_norm_statistics", _batch_norm_statistics, "CPU")
_library.impl("batch_norm_statistics", _batch_norm_statistics, "CUDA")
_library.impl("batch_norm_statistics", _like, "Meta")
