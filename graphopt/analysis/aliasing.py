"""Which node owns the memory that another node only looks at.

Views cost nothing and keep their base alive. Both facts are needed to count bytes: `storage` is
the one place that knows which operators are views.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx

from graphopt.graph import Graph, operator_name

# Operators that return their input's memory although their schema does not say so.
_UNDECLARED = frozenset({"aten._unsafe_view.default", "_c10d_functional.wait_tensor.default"})


@dataclass(frozen=True)
class Storage:
    """Owners of memory.

    Attributes:
        owner: for each node the node whose memory its value lies in, itself when it allocates.
            A ``getitem`` of an allocating operator owns its own piece.
        views: nodes that neither compute nor copy.
    """

    owner: Mapping[fx.Node, fx.Node]
    views: frozenset[fx.Node]


def storage(graph: Graph) -> Storage:
    """Follow every view and in-place operator of `graph` to the node that allocated its memory."""
    owner: dict[fx.Node, fx.Node] = {}
    views: set[fx.Node] = set()
    for node in graph.nodes:
        owner[node] = node
        if node.op != "call_function":
            continue
        if node.target is operator.getitem:
            views.add(node)
            producer = node.all_input_nodes[0]
            if owner[producer] is not producer:
                owner[node] = owner[producer]
            continue
        source, written = _aliased(node)
        if source is not None:
            owner[node] = owner[source]
            if not written:
                views.add(node)
    return Storage(owner, frozenset(views))


def _aliased(node: fx.Node) -> tuple[fx.Node | None, bool]:
    """The argument whose memory the result lies in, and whether the operator writes into it."""
    if operator_name(node) in _UNDECLARED:
        return node.all_input_nodes[0], False
    if not isinstance(node.target, torch._ops.OpOverload):
        return None, False
    schema = node.target._schema
    result = schema.returns[0].alias_info if schema.returns else None
    if result is None:
        return None, False
    for position, argument in enumerate(schema.arguments):
        info = argument.alias_info
        if info is None or not (info.before_set & result.before_set):
            continue
        value = node.args[position] if position < len(node.args) else node.kwargs[argument.name]
        if isinstance(value, fx.Node):
            return value, info.is_write
    return None, False
