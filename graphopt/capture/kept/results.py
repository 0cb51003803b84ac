"""What forward returns, as data: which results of the graph, which inputs, in which containers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from graphopt.capture.kept.fingerprints import Unkept
from graphopt.capture.kept.sources import Unreadable

_CONSTANTS = (type(None), bool, int, float, str)


def result_of(value: object, outputs: Sequence[Tensor], inputs: Mapping[int, int]) -> Any:
    """What was returned as data.

    Args:
        value: it.
        outputs: results of the graph.
        inputs: the place of each tensor of the call, by its id.

    Raises:
        Unkept: something else is in it.
    """
    if isinstance(value, Tensor):
        position = next((i for i, output in enumerate(outputs) if output is value), None)
        if position is not None:
            return {"result": position}
        if id(value) in inputs:
            return {"input": inputs[id(value)]}
        raise Unkept("forward returns a tensor that is neither computed nor an input")
    if type(value) in _CONSTANTS:
        return {"constant": value}
    if type(value) in (tuple, list):
        assert isinstance(value, tuple | list)
        return {type(value).__name__: [result_of(item, outputs, inputs) for item in value]}
    if type(value) is dict and all(type(key) in (int, str) for key in value):
        pairs = [[key, result_of(item, outputs, inputs)] for key, item in value.items()]
        return {"dict": pairs}
    raise Unkept(f"forward returns a {type(value).__qualname__}")


def containers(value: object) -> Iterator[object]:
    """All lists and dictionaries within a value."""
    if isinstance(value, list | dict):
        yield value
    items = value.values() if isinstance(value, dict) else value
    if isinstance(value, tuple | list | dict):
        for item in items:  # type: ignore[attr-defined]
            yield from containers(item)


Make = Callable[[Sequence[Any], Sequence[Any]], object]


def maker(data: Any, results: int, inputs: Mapping[int, int]) -> Make:
    """A function from the results of the graph and the tensors read off a call to what it returns.

    Args:
        data: as `result_of` has made it, or anything else.
        results: how many the graph has.
        inputs: the position among the tensors that are read of each place.

    Raises:
        Unreadable: it is none.
    """
    if not isinstance(data, dict) or len(data) != 1:
        raise Unreadable("what forward returns cannot be read")
    ((kind, what),) = data.items()
    if kind == "constant" and type(what) in _CONSTANTS:
        return lambda outputs, given: what
    if kind == "result" and type(what) is int and 0 <= what < results:
        return lambda outputs, given: outputs[what]
    if kind == "input" and type(what) is int and what in inputs:
        position = inputs[what]
        return lambda outputs, given: given[position]
    if kind in ("tuple", "list") and isinstance(what, list):
        parts = [maker(item, results, inputs) for item in what]
        made = tuple if kind == "tuple" else list
        return lambda outputs, given: made(part(outputs, given) for part in parts)
    if kind == "dict" and isinstance(what, list):
        pairs = []
        for pair in what:
            if not isinstance(pair, list) or len(pair) != 2 or type(pair[0]) not in (int, str):
                raise Unreadable("what forward returns cannot be read")
            pairs.append((pair[0], maker(pair[1], results, inputs)))
        return lambda outputs, given: {key: part(outputs, given) for key, part in pairs}
    raise Unreadable("what forward returns cannot be read")
