"""The tensors in the arguments and results of a call, by where they are in them."""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from graphopt.model.owners import is_open
from graphopt.model.places import Attributes

# What is nested deeper, and what more objects hold than this, goes unnamed.
_DEPTH = 64
_OBJECTS = 10_000


def tensors_of(
    value: object, path: str = "", *, in_objects: bool = True
) -> Iterator[tuple[str, Tensor]]:
    """All tensors in nested containers, dataclasses and plain objects, with their paths.

    No two paths are equal. Private attributes of plain objects are left out of them where that
    names one tensor: ``data.x`` for ``data._store._mapping['x']``.
    """
    taken: set[str] = set()
    for whole, short, tensor in _Walk(in_objects).tensors(value, path, path):
        name = whole if short in taken else short
        while name in taken:
            name += "_"
        taken.add(name)
        yield name or "0", tensor


class _Walk:
    """Goes through everything once but containers, which may be in several places."""

    def __init__(self, in_objects: bool) -> None:
        self._in_objects = in_objects
        self._objects: set[int] = set()
        self._around: set[int] = set()

    def tensors(self, value: object, whole: str, short: str) -> Iterator[tuple[str, str, Tensor]]:
        """Tensors with their paths, and these without private attributes."""
        if isinstance(value, Tensor):
            yield whole, short, value
            return
        items = self._items(value)
        if items is None or id(value) in self._around or len(self._around) > _DEPTH:
            return
        own = not isinstance(value, Mapping | list | tuple | deque)
        self._around.add(id(value))
        for key, item in items:
            public = short if own and str(key).startswith("_") else _join(short, key)
            yield from self.tensors(item, _join(whole, key), public)
        self._around.discard(id(value))

    def _items(self, value: object) -> Iterable[tuple[object, Any]] | None:
        if isinstance(value, Mapping):
            return value.items()
        if isinstance(value, list | tuple | deque):
            return enumerate(value)
        if isinstance(value, type | nn.Module) or id(value) in self._objects:
            return None
        if dataclasses.is_dataclass(value):
            return [(f.name, getattr(value, f.name)) for f in dataclasses.fields(value)]
        closed = not self._in_objects or len(self._objects) > _OBJECTS
        if closed or not is_open(value):
            return None
        self._objects.add(id(value))
        return Attributes(value).items()


def _join(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)
