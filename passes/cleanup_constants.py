"""The part of cleanup that computes small constants once, while compiling.

A node is constant if it depends on no input. What is computed anew at each step and is small becomes
an attribute of the module; fills (``full``, ``arange``) stay, since code generators make them for
free inside another kernel and eager needs microseconds, and so do views of constants.
"""

from __future__ import annotations

import operator
from typing import Any, cast

import torch
from torch import Tensor, fx

from graphopt.analysis.cost import tensor_bytes
from graphopt.analysis.effects import derived
from graphopt.analysis.identity import VIEWS, geometry
from graphopt.analysis.sharing import REASONS, Seen, Sharing
from graphopt.graph import Graph, value_of
from graphopt.passbase import Applied, Declined, Outcome

LIMIT = 64 * 1024
"""Bytes of the largest constant that is kept, and of the largest intermediate on the way to it."""

PREFIX = "_folded_"

aten = torch.ops.aten
_LITERAL = aten.lift_fresh_copy.default
_FILLS = frozenset(
    {
        _LITERAL,
        aten.arange.default,
        aten.arange.start,
        aten.arange.start_step,
        aten.eye.default,
        aten.eye.m,
        aten.full.default,
        aten.ones.default,
        aten.scalar_tensor.default,
        aten.zeros.default,
    }
)


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
        if _is_cheap(node):
            wanted.add(node)
            continue
        cone = _cone(node, constants)
        reason, detail = _obstacle(node, cone, sharing, values)
        if reason:
            declined.append(Declined(node.name, reason, detail, {"nodes": len(cone)}))
            wanted.add(node)
            continue
        name = _store(graph, node, values[node])
        size = tensor_bytes(value_of(node))
        applied.append(Applied(name, "folded constant", {"nodes": len(cone), "bytes": size}))
    return Outcome(tuple(applied), tuple(declined))


def _constants(
    graph: Graph, sharing: Sharing, declined: list[Declined]
) -> dict[fx.Node, None]:
    """Small constants in graph order; notes which are too large."""

    def admits(node: fx.Node) -> bool:
        if sharing.seen(node) & Seen.WRITTEN:
            return False
        if isinstance(value_of(node), tuple | list) or tensor_bytes(_memory(node)) <= LIMIT:
            return True
        if not _is_cheap(node):
            size = tensor_bytes(value_of(node))
            detail = f"a constant of more than {LIMIT} bytes stays an operator"
            declined.append(Declined(node.name, "too-large", detail, {"bytes": size}))
        return False

    def _memory(node: fx.Node) -> Any:
        return value_of(sharing.owner(node))

    literals = [n for n in graph.nodes if n.op == "get_attr" and _is_private(n)]
    return derived(graph, literals, admits)


def _is_private(node: fx.Node) -> bool:
    """Whether only the graph holds the tensor behind an attribute, so that it never changes."""
    return str(node.target).startswith(PREFIX) or all(u.target is _LITERAL for u in node.users)


def _is_cheap(node: fx.Node) -> bool:
    if node.target is operator.getitem:
        return False
    return node.target in _FILLS or node.target in VIEWS or not isinstance(value_of(node), Tensor)


def _cone(node: fx.Node, constants: dict[fx.Node, None]) -> list[fx.Node]:
    """The constants that `node` is computed from, itself included, in graph order."""
    found = {node}
    pending = [node]
    while pending:
        for operand in pending.pop().all_input_nodes:
            if operand in constants and operand not in found:
                found.add(operand)
                pending.append(operand)
    return [n for n in constants if n in found]


def _obstacle(
    node: fx.Node, cone: list[fx.Node], sharing: Sharing, values: dict[fx.Node, Any]
) -> tuple[str, str]:
    if sharing.seen(node) & (Seen.RETURNED | Seen.STORED):
        return "escapes", "each call returns a new tensor; " + REASONS["escapes"]
    try:
        _evaluate(cone, values)
    except (RuntimeError, AssertionError) as error:
        return "not-computable", f"it cannot be computed here: {str(error).splitlines()[0]}"
    if not _is_as_recorded(node, values[node]):
        return "differs", "computed here, it has another dtype, device or layout than when captured"
    return "", ""


def _evaluate(cone: list[fx.Node], values: dict[fx.Node, Any]) -> None:
    with torch.no_grad():
        for node in cone:
            if node not in values:
                args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: _read(n, values))
                values[node] = cast("Any", node.target)(*args, **kwargs)


def _read(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    if node.op == "get_attr":
        return operator.attrgetter(str(node.target))(node.graph.owning_module)
    return values[node]


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
    while hasattr(graph.module, f"{PREFIX}{index}"):
        index += 1
    name = f"{PREFIX}{index}"
    graph.module.register_buffer(name, value)
    with graph.fx.inserting_before(node):
        constant = graph.fx.get_attr(name)
    constant.meta = dict(node.meta)
    node.replace_all_uses_with(constant)
    graph.fx.erase_node(node)
    return name
