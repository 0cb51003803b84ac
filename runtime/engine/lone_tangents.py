"""Tangents that a backward only adds to another gradient, and which may be missing.

The call returns a loss and logits, and the user differentiates the loss. Zeros for the logits'
tangent would be as large as these, and be added: time, and memory where a backward has the most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.fx._lazy_graph_module import _LazyGraphModule

from graphopt.analysis.aliasing import storage_of
from graphopt.ops import tangent as _tangent  # noqa: F401
from graphopt.runtime.engine.halves import Halves, copy_graph

_ADD = torch.ops.aten.add.Tensor
_ADD_TANGENT = torch.ops.graphopt.add_tangent.default


def without_zeros(halves: Halves) -> Halves:
    """Halves whose backward does without zeros for tangents that it only adds to a gradient."""
    graph = copy_graph(halves.backward.graph)
    arguments = graph.find_nodes(op="placeholder")
    tangents = [
        node for (kind, _), node in zip(halves.sources, arguments, strict=True) if kind == "tangent"
    ]
    owner = storage_of(graph.nodes).owner
    returned = {
        owner[value]
        for value in cast("Sequence[Any]", graph.output_node().args[0])
        if isinstance(value, fx.Node)
    }
    found = False
    for node in tangents:
        sums = list(node.users)
        if sums and all(_adds(user, node) and owner[user] not in returned for user in sums):
            for user in sums:
                _replace(graph, user, node)
            found = True
    if not found:
        return halves
    return replace(halves, backward=_LazyGraphModule(halves.backward, graph))


def may_lack(tangent: fx.Node) -> bool:
    """Whether a backward takes ``None`` for this argument."""
    return bool(tangent.users) and all(
        user.target is _ADD_TANGENT and user.args[0] is not tangent for user in tangent.users
    )


def _adds(user: fx.Node, tangent: fx.Node) -> bool:
    """Whether a node is the sum of the tangent and a value like it."""
    if user.target is not _ADD or user.kwargs or user.args[0] is user.args[1]:
        return False
    other = _other(user, tangent)
    value = other.meta.get("val") if isinstance(other, fx.Node) else None
    result = user.meta.get("val")
    return (
        isinstance(value, Tensor)
        and isinstance(result, Tensor)
        and isinstance(other, fx.Node)
        and other.op == "call_function"
        and (value.shape, value.stride(), value.dtype)
        == (result.shape, result.stride(), result.dtype)
    )


def _other(user: fx.Node, tangent: fx.Node) -> Any:
    first, second = user.args
    return second if first is tangent else first


def _replace(graph: fx.Graph, user: fx.Node, tangent: fx.Node) -> None:
    with graph.inserting_before(user):
        added = graph.call_function(_ADD_TANGENT, (_other(user, tangent), tangent))
    added.meta = dict(user.meta)
    user.replace_all_uses_with(added)
    graph.erase_node(user)
