"""Symbolic sizes as the numbers that they were in the captured call.

Times, bytes and trials need numbers. Asking for them here adds no condition to the graph, whereas
comparing a symbol would.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map


def hint(size: Any) -> int | None:
    """A whole number as it was in the captured call; ``None`` where it depends on data."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    return int(size.node.hint) if size.node.has_hint() else None


def hints(sizes: Iterable[Any]) -> tuple[int, ...] | None:
    """Numbers as they were in the captured call; ``None`` where one depends on data."""
    found = [hint(size) for size in sizes]
    known = tuple(size for size in found if size is not None)
    return known if len(known) == len(found) else None


def is_known(value: Tensor) -> bool:
    """Whether no size of a tensor depends on data."""
    return hints(value.shape) is not None


def elements(value: Tensor) -> int | None:
    """How many elements a tensor had in the captured call; ``None`` where data decide it."""
    shape = hints(value.shape)
    return None if shape is None else math.prod(shape)


def at_hint(values: Any) -> Any:
    """Fake values and numbers, nested as they may be, with sizes of the captured call.

    Tensors with symbols come back on the meta device; so does what depends on data, unchanged.
    """

    def one(value: Any) -> Any:
        if isinstance(value, torch.SymInt):
            found = hint(value)
            return value if found is None else found
        if not isinstance(value, Tensor) or value.layout is not torch.strided:
            return value
        numbers = (*value.shape, *value.stride())
        if all(type(number) is int for number in numbers):
            return value
        shape, stride = hints(value.shape), hints(value.stride())
        if shape is None or stride is None:
            return value
        return torch.empty_strided(shape, stride, dtype=value.dtype, device="meta")

    return tree_map(one, values)


def empty_at_hint(fake: Tensor, device: torch.device | str | None = None) -> Tensor:
    """A real tensor in the form of a fake one, by default on its device; values are anything."""
    shape, stride = hints(fake.shape), hints(fake.stride())
    assert shape is not None, fake.shape
    assert stride is not None, fake.stride()
    return torch.empty_strided(shape, stride, dtype=fake.dtype, device=device or fake.device)
