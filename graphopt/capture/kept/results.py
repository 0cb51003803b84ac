"""What forward returned in an earlier process, made again of the results of a graph.

The data is that of `returned`, or anything else: it is checked, and nothing of it is carried out.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from graphopt.capture.kept import classes
from graphopt.capture.kept.sources import Unreadable

_CONSTANTS = (type(None), bool, int, float, str)
_DICTS: dict[str, Any] = {"dict": dict, "ordered": OrderedDict}
_LISTS: dict[str, Any] = {"tuple": tuple, "list": list}

Make = Callable[[Sequence[Any], Sequence[Any]], object]


def maker(data: Any, results: int, inputs: Mapping[int, int], known: Sequence[type] = ()) -> Make:
    """A function from the results of the graph and the tensors read off a call to what it returns.

    Args:
        data: as `Returned` has it, or anything else.
        results: how many the graph has.
        inputs: the position among the tensors that are read of each place.
        known: the classes of its objects.

    Raises:
        Unreadable: it is none.
    """
    return _Reader(results, inputs, known).read(data)


class _Reader:
    def __init__(self, results: int, inputs: Mapping[int, int], known: Sequence[type]) -> None:
        self._results, self._inputs, self._known = results, inputs, known

    def read(self, data: Any) -> Make:
        if not isinstance(data, dict) or len(data) != 1:
            raise _unreadable()
        ((kind, what),) = data.items()
        made = self._leaf(kind, what) if not isinstance(what, list) else None
        if made is None and isinstance(what, list):
            made = self._container(kind, what)
        if made is None:
            raise _unreadable()
        return made

    def _leaf(self, kind: str, what: Any) -> Make | None:
        if kind == "result" and type(what) is int and 0 <= what < self._results:
            return lambda outputs, given: outputs[what]
        if kind == "input" and type(what) is int and what in self._inputs:
            position = self._inputs[what]
            return lambda outputs, given: given[position]
        if kind == "constant" and type(what) in _CONSTANTS:
            value = what
        elif kind == "dtype" and type(what) is str:
            value = vars(torch).get(what)
            if type(value) is not torch.dtype:
                return None
        elif kind == "device" and type(what) is str:
            try:
                value = torch.device(what)
            except RuntimeError as error:
                raise _unreadable() from error
        elif kind == "class":
            value = self._class(what)
        else:
            return None
        return lambda outputs, given: value

    def _container(self, kind: str, what: list[Any]) -> Make | None:
        if kind in _LISTS:
            parts, made = [self.read(item) for item in what], _LISTS[kind]
            return lambda outputs, given: made(part(outputs, given) for part in parts)
        if kind in _DICTS:
            pairs, mapping = self._pairs(what, (int, str)), _DICTS[kind]
            return lambda outputs, given: mapping(
                [(key, part(outputs, given)) for key, part in pairs]
            )
        if kind == "fields" and len(what) == 2 and isinstance(what[1], list):
            return self._fields(self._class(what[0]), [self.read(item) for item in what[1]])
        if kind == "object" and len(what) == 3 and isinstance(what[1], list):
            return self._object(self._class(what[0]), self._pairs(what[1], (str,)), what[2])
        return None

    def _pairs(self, what: list[Any], keys: tuple[type, ...]) -> list[tuple[Any, Make]]:
        pairs = []
        for pair in what:
            if not isinstance(pair, list) or len(pair) != 2 or type(pair[0]) not in keys:
                raise _unreadable()
            pairs.append((pair[0], self.read(pair[1])))
        return pairs

    def _class(self, number: object) -> type:
        if type(number) is not int or not 0 <= number < len(self._known):
            raise Unreadable("it returns an object of no class")
        return self._known[number]

    def _fields(self, cls: type, parts: Sequence[Make]) -> Make:
        if not issubclass(cls, tuple) or len(parts) != len(classes.fields_of(cls) or ()):
            raise Unreadable(f"it returns a {cls.__qualname__} with other fields")
        made = classes.tuple_maker(cls)
        return lambda outputs, given: made([part(outputs, given) for part in parts])

    def _object(self, cls: type, pairs: Sequence[tuple[str, Make]], items: Any) -> Make:
        names, parts = [name for name, _ in pairs], [part for _, part in pairs]
        sound = len({*names}) == len(names) and all(classes.is_attribute(cls, n) for n in names)
        if issubclass(cls, tuple) or not sound:
            raise Unreadable(f"it returns a {cls.__qualname__} with other fields")
        listed = isinstance(items, list) and all(item in names for item in items)
        if not listed or (items and not issubclass(cls, dict)):
            raise Unreadable(f"it returns a {cls.__qualname__} with other items")
        made = classes.object_maker(cls, names, items)
        try:
            made([None] * len(names))
        except (TypeError, AttributeError) as error:
            raise Unreadable(f"it returns a {cls.__qualname__}, which is not made so") from error
        return lambda outputs, given: made([part(outputs, given) for part in parts])


def _unreadable() -> Unreadable:
    return Unreadable("what forward returns cannot be read")
