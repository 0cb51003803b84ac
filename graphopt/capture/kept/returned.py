"""What forward returns, as data: which results of the graph, which inputs, in which objects.

`results` makes it again of such data.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from graphopt.capture.kept import classes
from graphopt.capture.kept.fingerprints import Fingerprints, Unkept

_CONSTANTS = (type(None), bool, int, float, str)
_LEAVES = (Tensor, type, torch.dtype, torch.device, *_CONSTANTS)


class Returned:
    """What was returned as data.

    Args:
        value: it.
        outputs: results of the graph.
        inputs: the place of each tensor of the call, by its id.
        of: fingerprints of its classes.

    Attributes:
        data: it.
        classes: of its objects, as data.

    Raises:
        Unkept: something else is in it.
    """

    def __init__(
        self, value: object, outputs: Sequence[Tensor], inputs: Mapping[int, int], of: Fingerprints
    ) -> None:
        self.classes: list[Any] = []
        self._at: dict[type, int] = {}
        self._outputs, self._inputs, self._of = outputs, inputs, of
        self._met: set[int] = set()
        self.data = self._data(value)

    def _data(self, value: Any) -> Any:
        kind = type(value)
        if isinstance(value, Tensor):
            return self._tensor(value)
        if kind in _CONSTANTS:
            return {"constant": value}
        if kind in (torch.dtype, torch.device):
            return {kind.__name__: str(value).removeprefix("torch.")}
        if isinstance(value, type):
            return {"class": self._class(value)}
        if not isinstance(value, tuple):
            if id(value) in self._met:
                raise Unkept(f"forward returns the same {kind.__qualname__} twice")
            self._met.add(id(value))
        if kind in (tuple, list):
            return {kind.__name__: [self._data(item) for item in value]}
        if kind in (dict, OrderedDict) and all(type(key) in (int, str) for key in value):
            pairs = [[key, self._data(item)] for key, item in value.items()]
            return {"dict" if kind is dict else "ordered": pairs}
        number = self._class(kind)
        if isinstance(value, tuple):
            if getattr(value, "__dict__", None):
                raise Unkept(
                    f"forward returns an object of class {kind.__qualname__} with attributes"
                )
            return {"fields": [number, [self._data(item) for item in value]]}
        return {"object": [number, *self._object(value)]}

    def _tensor(self, value: Tensor) -> Any:
        position = next((i for i, output in enumerate(self._outputs) if output is value), None)
        if position is not None:
            return {"result": position}
        if id(value) in self._inputs:
            return {"input": self._inputs[id(value)]}
        raise Unkept("forward returns a tensor that is neither computed nor an input")

    def _class(self, cls: type) -> int:
        if cls not in self._at:
            self.classes.append(classes.row_of(cls, self._of))
            self._at[cls] = len(self._at)
        return self._at[cls]

    def _object(self, value: object) -> list[Any]:
        """Attributes of an object, and those of them that are its items as well."""
        cls, name = type(value), type(value).__qualname__
        attributes = classes.attributes_of(value)
        if others := [a for a in attributes if not classes.is_attribute(cls, a)]:
            why = f"with {others[0]!r}, which is no plain field"
            raise Unkept(f"forward returns an object of class {name} {why}")
        items = _items(value)
        if any(attributes.get(key, items) is not item for key, item in items):
            raise Unkept(f"forward returns an object of class {name} with items that are no fields")
        pairs = [[key, self._data(item)] for key, item in attributes.items()]
        return [pairs, [key for key, _ in items]]


def _items(value: object) -> list[tuple[Any, Any]]:
    """Of a dictionary of a class of its own, whatever that class says of them."""
    base = classes.base_of(type(value))
    return list(base.items(value)) if issubclass(base, dict) else []  # type: ignore[arg-type]


def objects(value: object) -> Iterator[object]:
    """All within a value of the kinds above that can change: lists, dictionaries and objects."""
    if isinstance(value, _LEAVES):
        return
    parts: Iterable[object] = value if isinstance(value, tuple | list) else ()
    if type(value) in (dict, OrderedDict):
        parts = [item for _, item in _items(value)]
    elif not isinstance(value, tuple | list):
        parts = classes.attributes_of(value).values()  # of which its items are some
    if not isinstance(value, tuple):
        yield value
    for part in parts:
        yield from objects(part)


def same(value: Any, other: Any) -> bool:
    """Whether two values are alike: classes, order, constants; tensors are the same ones."""
    if type(value) is not type(other):
        return False
    if isinstance(value, _LEAVES):
        return value is other or (not isinstance(value, Tensor) and repr(value) == repr(other))
    here, there = map(_contents, (value, other))
    return len(here) == len(there) and all(
        key == name and same(part, item)
        for (key, part), (name, item) in zip(here, there, strict=True)
    )


def _contents(value: object) -> list[tuple[object, object]]:
    """Items and attributes of a value, in order."""
    found: list[tuple[object, object]] = []
    if isinstance(value, tuple | list):
        found += [(None, item) for item in value]
    elif isinstance(value, dict):
        found += _items(value)
    return [*found, *classes.attributes_of(value).items()]
