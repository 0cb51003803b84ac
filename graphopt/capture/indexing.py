"""Slices of everything, ``x[:, 0]`` and ``x[:, None]``, where sizes are symbols.

Indexing by several things leaves such a slice out where it sees that it begins at 0 and ends at the
size. It does not see that of a symbol, so the graph would copy whole tensors in the backward, which
eager does not. Here such indexing is written as the operators that eager runs for it.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

aten = torch.ops.aten


def without_whole_slices(module: fx.GraphModule) -> None:
    """Rewrite in place.

    Args:
        module: a torch-level graph with example values.
    """
    for node in module.graph.find_nodes(op="call_function", target=operator.getitem):
        base = node.args[0]
        value = _example(base)
        index = node.args[1]
        if not isinstance(value, Tensor) or not isinstance(index, tuple):
            continue  # eager does not leave out the slice of x[:] either
        if not all(map(_plain, index)):
            continue
        places = _places(index, value.dim())
        whole = [
            isinstance(one, slice) and _whole(one, value.shape[place])
            for one, place in zip(index, places, strict=True)
        ]
        if any(whole):
            with module.graph.inserting_before(node):
                node.replace_all_uses_with(_indexed(node, base, index, whole, value.dim()))
            module.graph.erase_node(node)
    module.recompile()


def _example(value: object) -> Any:
    return value.meta.get("example_value") if isinstance(value, fx.Node) else value


def _plain(one: object) -> bool:
    """Whether this is something that an index is made of here."""
    value = _example(one)
    if isinstance(value, Tensor):
        return value.dtype in (torch.int64, torch.bool) and value.dim() > 0
    return one is None or one is Ellipsis or isinstance(one, slice) or _whole_number(value)


def _whole_number(value: object) -> bool:
    return isinstance(value, int | torch.SymInt) and not isinstance(value, bool)


def _consumes(one: object) -> int:
    """How many dimensions it takes."""
    value = _example(one)
    if isinstance(value, Tensor):
        return value.dim() if value.dtype is torch.bool else 1
    return 0 if one is None or one is Ellipsis else 1


def _places(index: Sequence[object], dims: int) -> list[int]:
    """The dimension of the base that each part of an index begins at."""
    places, place = [], 0
    for one in index:
        places.append(place)
        place += dims - sum(map(_consumes, index)) if one is Ellipsis else _consumes(one)
    return places


def _whole(one: slice, size: Any) -> bool:
    begin, end, step = (_example(part) for part in (one.start, one.stop, one.step))
    # Comparing a symbol would make a condition of it.
    if any(isinstance(part, torch.SymInt) for part in (begin, step)):
        return False
    if begin not in (None, 0) or step not in (None, 1):
        return False
    return end is None or bool(statically_known_true(end >= size))


def _indexed(
    node: fx.Node, base: Any, index: Sequence[Any], whole: Sequence[bool], dims: int
) -> fx.Node:
    """As eager's indexing goes: slices, numbers and new dimensions first, then tensors."""

    def call(target: Any, *args: Any) -> fx.Node:
        made = node.graph.call_function(target, args)
        made.meta = {k: v for k, v in node.meta.items() if k != "example_value"}
        return made

    result, place = base, 0
    tensors: list[Any] = []
    for one, leave in zip(index, whole, strict=True):
        if one is Ellipsis:
            place += dims - sum(map(_consumes, index))
        elif one is None:
            result, place = call(aten.unsqueeze.default, result, place), place + 1
        elif isinstance(one, slice):
            if not leave:
                parts = (one.start, one.stop, 1 if one.step is None else one.step)
                result = call(aten.slice.Tensor, result, place, *parts)
            place += 1
        elif isinstance(_example(one), Tensor):
            tensors += [None] * (place - _taken(tensors)) + [one]
            place += _consumes(one)
        else:
            result = call(aten.select.int, result, place, one)
    if tensors:
        result = call(aten.index.Tensor, result, tensors)
    elif result is base:
        result = call(aten.alias.default, result)
    result.meta = dict(node.meta)
    return cast("fx.Node", result)


def _taken(tensors: Sequence[Any]) -> int:
    """How many dimensions the tensors of an index so far are for."""
    return sum(1 if one is None else _consumes(one) for one in tensors)
