"""What several optimizers ask of tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graphopt.errors import ArgumentError


def norm_of(tensor: Tensor) -> Tensor:
    """The Euclidean norm, in float32 or more."""
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    norm: Tensor = torch.linalg.vector_norm(tensor, dtype=dtype)
    return norm


def refuse_sparse(group: dict[str, Any]) -> None:
    """Raise `ArgumentError` for a gradient that is sparse."""
    names = group.get("param_names") or [str(i) for i in range(len(group["params"]))]
    for name, parameter in zip(names, group["params"], strict=True):
        if parameter.grad is not None and parameter.grad.is_sparse:
            raise ArgumentError(
                "a sparse gradient cannot be used",
                where=f"parameter {name!r}",
                hint="make the embedding with sparse=False, or give it to torch.optim.SparseAdam",
            )
