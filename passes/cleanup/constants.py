"""The part of cleanup that computes small constants once, while compiling.

A node is constant if it depends on no input. What is computed anew at each step and is small
becomes an attribute of the module, and so does the copy that capture makes of each literal; fills
(``full``, ``arange``) and views of constants stay.
"""

from __future__ import annotations

import operator
from typing import Any, cast

import torch
from torch import Tensor, fx

from graphopt.analysis.constants import FOLDED, LITERAL, cone, derived, is_cheap, private_attributes
from graphopt.analysis.cost import tensor_bytes
from graphopt.analysis.identity import geometry
from graphopt.analysis.sharing import REASONS, Seen, Sharing
from graphopt.graph import Graph, value_of
from graphopt.passbase import Applied, Declined, Outcome

LIMIT = 64 * 1024
"""Bytes of the largest constant that is kept, and of the largest intermediate on the way to it."""


def fold_constants(graph: Graph, sharing: Sharing) -> Outcome:
    """Replace constants that take computing by attributes ``_folded_0``, … of the module."""
    applied: list[Applied] = []
    declined: list[Declined] = []
    values: dict[fx.Node, Any] = {}
    constants = _constants(graph, sharing, declined)
    wanted: set[fx.Node] = set()
    for node in reversed(constants):
        if all(user in constants and user not in wanted for user in node.users):
            continue
        if is_cheap(node, sharing):
            wanted.add(node)
            continue
        within = cone(node, constants)
        needed = [n for n in constants if n in within]
        reason, detail = _obstacle(graph, node, needed, sharing, values)
        if reason:
            declined.append(Declined(node.name, reason, detail, {"nodes": len(needed)}))
            wanted.add(node)
            continue
        name = _store(graph, node, values[node])
        size = tensor_bytes(value_of(node))
        applied.append(Applied(name, "folded constant", {"nodes": len(needed), "bytes": size}))
    return Outcome(tuple(applied), tuple(declined))


def _constants(graph: Graph, sharing: Sharing, declined: list[Declined]) -> dict[fx.Node, None]:
    """Small constants in graph order; notes which are too large."""

    def admits(node: fx.Node) -> bool:
        if sharing.seen(node) & Seen.WRITTEN:
            return False
        size = tensor_bytes(value_of(sharing.owner(node)))
        is_stored = node.target is LITERAL or isinstance(value_of(node), tuple | list)
        if is_stored or size <= LIMIT:
            return True
        if not is_cheap(node, sharing):
            detail = f"a constant of more than {LIMIT} bytes stays an operator"
            declined.append(Declined(node.name, "too-large", detail, {"bytes": size}))
        return False

    return derived(graph, private_attributes(graph), admits)


def _obstacle(
    graph: Graph,
    node: fx.Node,
    needed: list[fx.Node],
    sharing: Sharing,
    values: dict[fx.Node, Any],
) -> tuple[str, str]:
    if sharing.seen(node) & (Seen.RETURNED | Seen.STORED):
        return "escapes", "each call returns a new tensor; " + REASONS["escapes"]
    try:
        _evaluate(graph, needed, values)
    except (RuntimeError, AssertionError) as error:
        return "not-computable", f"it cannot be computed here: {str(error).splitlines()[0]}"
    if not _is_as_recorded(node, values[node]):
        return "differs", "computed here, it has another dtype, device or layout than when captured"
    return "", ""


def _evaluate(graph: Graph, needed: list[fx.Node], values: dict[fx.Node, Any]) -> None:
    def read(node: fx.Node) -> Any:
        if node.op == "get_attr":
            return operator.attrgetter(str(node.target))(graph.module)
        return values[node]

    with torch.no_grad():
        for node in needed:
            if node not in values:
                args, kwargs = fx.map_arg((node.args, node.kwargs), read)
                values[node] = cast("Any", node.target)(*args, **kwargs)


def _is_as_recorded(node: fx.Node, value: Any) -> bool:
    recorded = geometry(node)
    return type(value) is Tensor and recorded == (
        value.dtype,
        value.device,
        value.shape,
        value.stride(),
        value.storage_offset(),
    )


def _store(graph: Graph, node: fx.Node, value: Tensor) -> str:
    index = 0
    while hasattr(graph.module, f"{FOLDED}{index}"):
        index += 1
    name = f"{FOLDED}{index}"
    graph.module.register_buffer(name, value)
    with graph.fx.inserting_before(node):
        constant = graph.fx.get_attr(name)
    constant.meta = dict(node.meta)
    node.replace_all_uses_with(constant)
    graph.fx.erase_node(node)
    return name
