"""What several optimizers ask of tensors, and how their steps begin."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from graphopt.errors import ArgumentError


def norm_of(tensor: Tensor) -> Tensor:
    """The Euclidean norm, in float32 or more."""
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    norm: Tensor = torch.linalg.vector_norm(tensor, dtype=dtype)
    return norm


def begin_step(groups: Iterable[dict[str, Any]], closure: Callable[[], Any] | None) -> Any:
    """What every `step` begins with: the gradients of the closure, of which none may be sparse.

    Args:
        groups: of parameters.
        closure: computes the gradients and returns the loss, if there is one.

    Returns:
        What the closure returned.

    Raises:
        ArgumentError: a gradient is sparse; no parameter has changed then.
    """
    loss = None
    if closure is not None:
        with torch.enable_grad():
            loss = closure()
    for group in groups:
        _refuse_sparse(group)
    return loss


def _refuse_sparse(group: dict[str, Any]) -> None:
    names = group.get("param_names") or [str(i) for i in range(len(group["params"]))]
    for name, parameter in zip(names, group["params"], strict=True):
        if parameter.grad is not None and parameter.grad.layout is not torch.strided:
            raise ArgumentError(
                "a sparse gradient cannot be used",
                where=f"parameter {name!r}",
                hint="make the embedding with sparse=False, or give it to torch.optim.SparseAdam",
            )
