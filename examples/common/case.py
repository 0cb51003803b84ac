"""One training step of a workload, for tests and for comparisons of compilers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    """A model with a batch of the size that training uses.

    Attributes:
        model: not optimized, on the device that was asked for, in training mode.
        inputs: positional arguments of ``model``.
        loss: of what ``model`` returns, a scalar.
        passes: the spec that suits the workload.
        exact: gradients through graphopt's eager backend are those of PyTorch eager, bit for bit.
    """

    model: nn.Module
    inputs: tuple[Any, ...]
    loss: Callable[[Any], Tensor]
    passes: str = "auto"
    exact: bool = True
