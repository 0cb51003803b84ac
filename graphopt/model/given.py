"""The tensors that a call is given, also those that lie in objects among its arguments."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from graphopt.model.owners import is_open
from graphopt.model.trial import named_arguments

# Arguments that hold more objects than this are no caches and no batches.
LIMIT = 10_000


def given_tensors(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Tensors of a call by where they are: ``ids``, ``batch.mask``, ``cache.layers.0.keys``.

    Objects are looked into as far as forward may change them: a cache of keys and values grows
    from call to call. Modules have the same sizes in each.
    """
    return dict(_found(named_arguments(model, args, kwargs), "", {}))


def _found(value: object, path: str, seen: dict[int, object]) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield path or "0", value
        return
    for key, item in _items(value, seen):
        yield from _found(item, f"{path}.{key}" if path else str(key), seen)


def _items(value: object, seen: dict[int, object]) -> Iterator[tuple[object, Any]]:
    """What is in a container or an object, with its key there."""
    if isinstance(value, Mapping):
        return iter(value.items())
    if isinstance(value, list | tuple):
        return iter(enumerate(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return ((f.name, getattr(value, f.name)) for f in dataclasses.fields(value))
    closed = isinstance(value, type | nn.Module) or not is_open(value)
    if closed or id(value) in seen or len(seen) > LIMIT:
        return iter(())
    seen[id(value)] = value  # objects may lead to themselves
    return iter(getattr(value, "__dict__", {}).items())
