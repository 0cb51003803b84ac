"""What operators that round compute where nothing is rounded.

A format is judged by what its rounding alone does to a graph, and a rewrite by what is left of it
without the rounding: the graph that it came from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

_UNROUNDED: dict[str, Callable[..., Any]] = {}


def unrounded(target: object) -> Callable[..., Any] | None:
    """The same operator without its rounding; ``None`` where it has none."""
    return _UNROUNDED.get(str(target)) if isinstance(target, torch._ops.OpOverload) else None


def declare(functions: Mapping[str, Callable[..., Any]]) -> None:
    """Say what the operators of a module are without rounding, by their names."""
    _UNROUNDED.update({f"graphopt.{name}.default": f for name, f in functions.items()})


def kept(x: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    """A quantiser that keeps the values, with a scale that nobody needs."""
    return x, x.new_ones(())


def read(values: Tensor, *_: object) -> Tensor:
    """The inverse of `kept`."""
    return values
