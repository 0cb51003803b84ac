"""Which node owns the memory behind a view.

Views cost nothing and keep their base alive. Counting bytes needs both facts; `storage` is the one
place that knows which operators are views.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import fx

from graphopt.graph import Graph

# Operators that return their input's memory although their schema does not say so.
_UNDECLARED = frozenset({"aten._unsafe_view.default", "_c10d_functional.wait_tensor.default"})


@dataclass(frozen=True)
class Storage:
    """Owners of memory.

    Attributes:
        owner: for each node the node whose memory its value lies in, itself when it allocates.
            The first ``getitem`` of each piece of an allocating operator owns that piece.
        views: nodes that neither compute nor copy.
    """

    owner: Mapping[fx.Node, fx.Node]
    views: frozenset[fx.Node]


def storage(graph: Graph) -> Storage:
    """Follow every view and in-place operator of `graph` to the node that allocated its memory."""
    return storage_of(graph.nodes)


def storage_of(nodes: Iterable[fx.Node]) -> Storage:
    """The same for all nodes of a graph, in order."""
    owner: dict[fx.Node, fx.Node] = {}
    views: set[fx.Node] = set()
    pieces: dict[tuple[fx.Node, Any], fx.Node] = {}
    for node in nodes:
        owner[node] = node
        if node.op != "call_function":
            continue
        if node.target is operator.getitem:
            views.add(node)
            producer = node.all_input_nodes[0]
            if owner[producer] is not producer:
                owner[node] = owner[producer]
            else:
                owner[node] = pieces.setdefault((producer, node.args[1]), node)
            continue
        source, written = _aliased(node)
        if source is not None:
            owner[node] = owner[source]
            if not written:
                views.add(node)
    return Storage(owner, frozenset(views))


def is_view(target: object) -> bool:
    """Whether an operator returns an operand's memory, or a piece of a tuple, as it is."""
    if target is operator.getitem:
        return True
    if not isinstance(target, torch._ops.OpOverload):
        return False
    found = _aliased_argument(target)
    return found is not None and not found[2]


def _aliased(node: fx.Node) -> tuple[fx.Node | None, bool]:
    """The argument whose memory the result lies in, and whether the operator writes into it."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return None, False
    found = _aliased_argument(node.target)
    if found is None:
        return None, False
    position, name, written = found
    value = node.args[position] if position < len(node.args) else node.kwargs[name]
    return (value, written) if isinstance(value, fx.Node) else (None, False)


@cache
def _aliased_argument(target: torch._ops.OpOverload) -> tuple[int, str, bool] | None:
    """Position and name of the argument whose memory an operator returns, and whether it writes."""
    schema = target._schema
    if str(target) in _UNDECLARED:
        return 0, schema.arguments[0].name, False
    result = schema.returns[0].alias_info if schema.returns else None
    if result is None:
        return None
    for position, argument in enumerate(schema.arguments):
        info = argument.alias_info
        # A list of views, as `split` returns it, has an alias annotation without names.
        if info is not None and (info.before_set & result.before_set or not result.before_set):
            return position, argument.name, info.is_write
    return None
