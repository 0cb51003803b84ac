"""Put the collectives of a grouping into the backward graph.

Each group becomes one message: its gradients are laid out one after the other as they lie in
memory, reduced, and viewed again in their own shapes. The collective starts right after the last
gradient of its group; all waits stand at the end of the backward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import getitem
from typing import Any

import torch
from torch import fx

import graphopt.ops.wire  # noqa: F401  (defines the operators)
from graphopt.graph import KEPT_META, Graph, value_of
from graphopt.plan import Phase, Role, Slot
from graphopt.rewrite import emit

aten = torch.ops.aten
c10d = torch.ops._c10d_functional
wire_ops = torch.ops.graphopt


@dataclass(frozen=True)
class _Message:
    """One group on its way: how to finish it at the end of the backward."""

    names: tuple[str, ...]
    finish: Callable[[], list[fx.Node]]


def insert_collectives(
    graph: Graph,
    groups: Sequence[Sequence[str]],
    *,
    wire: str,
    world: int,
    channel: str,
    scaled: bool,
) -> None:
    """Reduce the gradients of `graph`, in place.

    Args:
        graph: a joint graph without collectives.
        groups: names of parameters; every gradient at most once.
        wire: ``"native"``, ``"bf16"`` or ``"int32"``.
        world: number of ranks; gradients are averaged over them.
        channel: name under which the collectives find the ranks.
        scaled: whether the runtime scales the tangents by ``1 / world``, so that the sum over
            ranks is the mean already.
    """
    local = {name: graph.gradient(name) for group in groups for name in group}
    position = {node: i for i, node in enumerate(graph.nodes)}
    behind = dict(zip(graph.nodes, graph.nodes[1:], strict=False))
    factor = 1.0 if scaled else 1.0 / world
    start = _start_exact if wire == "int32" else _start
    messages: list[_Message] = []
    last = graph.inputs[-1]
    for group in groups:
        nodes = [local[name] for name in group]
        # Never before the group before it: all ranks must send in the same order, also one whose
        # graph computes the gradients in another.
        last = max(last, *nodes, key=position.__getitem__)
        with graph.fx.inserting_before(behind[last]):
            finish = start(graph, nodes, wire=wire, factor=factor, world=world, channel=channel)
        messages.append(_Message(tuple(group), finish))
    reduced: dict[str, fx.Node] = {}
    with graph.fx.inserting_before(graph.output):
        for message in messages:
            reduced.update(zip(message.names, message.finish(), strict=True))
    _return(graph, reduced, local)
    graph.changed()


def _return(graph: Graph, reduced: dict[str, fx.Node], local: dict[str, fx.Node]) -> None:
    outputs: dict[Slot, fx.Node] = {}
    for slot, node in zip(graph.signature.outputs, graph.outputs, strict=True):
        is_reduced = slot.role is Role.GRAD and slot.name in reduced
        outputs[slot] = reduced[slot.name] if is_reduced else node
    for name in reduced:
        outputs[Slot(Role.LOCAL, name, Phase.BACKWARD)] = local[name]
    graph.set_outputs(outputs)


# -- layout ----------------------------------------------------------------------------------------


def _memory_order(value: torch.Tensor) -> list[int]:
    """Dimensions from the outermost to the innermost in memory."""
    if value.layout is not torch.strided:
        return list(range(value.dim()))
    strides = value.stride()
    return sorted(range(value.dim()), key=lambda d: -strides[d])


def _flat(graph: Graph, node: fx.Node) -> fx.Node:
    """One dimension, in the order of memory, so that a dense gradient is not copied."""
    value: torch.Tensor = value_of(node)
    order = _memory_order(value)
    if order != list(range(value.dim())):
        node = emit(graph, aten.permute.default, node, order, like=node)
    if value.dim() != 1:
        node = emit(graph, aten.reshape.default, node, [-1], like=node)
    return node


def _shaped(graph: Graph, flat: fx.Node, like: fx.Node) -> fx.Node:
    """The inverse of `_flat` for the shape and layout of `like`."""
    value: torch.Tensor = value_of(like)
    order = _memory_order(value)
    node = flat
    if value.dim() != 1:
        node = emit(graph, aten.view.default, flat, [value.shape[d] for d in order], like=like)
    if order != list(range(value.dim())):
        inverse = [order.index(d) for d in range(value.dim())]
        node = emit(graph, aten.permute.default, node, inverse, like=like)
    return node


def _item(graph: Graph, node: fx.Node, index: int) -> fx.Node:
    item = graph.fx.call_function(getitem, (node, index))
    item.meta = {key: node.meta[key] for key in KEPT_META if key in node.meta}
    item.meta["val"] = value_of(node)[index]
    return item


# -- messages --------------------------------------------------------------------------------------


def _all_reduce(graph: Graph, node: fx.Node, operation: str, channel: str) -> fx.Node:
    # The operator's fake implementation asks for the group by name, which may not exist here.
    call = graph.fx.call_function(c10d.all_reduce.default, (node, operation, channel))
    return _like(call, node)


def _wait(graph: Graph, node: fx.Node) -> fx.Node:
    return _like(graph.fx.call_function(c10d.wait_tensor.default, (node,)), node)


def _like(node: fx.Node, like: fx.Node) -> fx.Node:
    node.meta = {key: like.meta[key] for key in KEPT_META if key in like.meta}
    value: torch.Tensor = value_of(like)
    node.meta["val"] = torch.empty_like(value)
    return node


def _start(
    graph: Graph, gradients: Sequence[fx.Node], *, wire: str, factor: float, channel: str, **_: Any
) -> Callable[[], list[fx.Node]]:
    parts = [_flat(graph, g) for g in gradients]
    sizes = [math.prod(value_of(g).shape) for g in gradients]
    dtype = value_of(gradients[0]).dtype
    flat = parts[0]
    if len(parts) > 1:
        flat = emit(graph, aten.cat.default, parts, like=gradients[-1])
    if factor != 1.0:
        flat = emit(graph, aten.mul.Tensor, flat, factor, like=flat)
    if wire == "bf16" and dtype is not torch.bfloat16:
        flat = emit(graph, aten._to_copy.default, flat, dtype=torch.bfloat16, like=flat)
    sent = _all_reduce(graph, flat, "sum", channel)

    def finish() -> list[fx.Node]:
        arrived = _wait(graph, sent)
        if value_of(arrived).dtype is not dtype:
            arrived = emit(graph, aten._to_copy.default, arrived, dtype=dtype, like=arrived)
        if len(gradients) == 1:
            return [_shaped(graph, arrived, gradients[0])]
        split = emit(graph, aten.split_with_sizes.default, arrived, sizes, like=arrived)
        items = [_item(graph, split, i) for i in range(len(sizes))]
        return [_shaped(graph, i, g) for i, g in zip(items, gradients, strict=True)]

    return finish


def _start_exact(
    graph: Graph, gradients: Sequence[fx.Node], *, world: int, channel: str, **_: Any
) -> Callable[[], list[fx.Node]]:
    """Integers of one exponent per gradient: no order of summation changes their sum."""
    like = gradients[-1]
    largest = emit(graph, wire_ops.magnitudes.default, list(gradients), like=like)
    common = _wait(graph, _all_reduce(graph, largest, "max", channel))
    words = emit(graph, wire_ops.to_wire.default, list(gradients), common, world, like=like)
    sent = _all_reduce(graph, words, "sum", channel)

    def finish() -> list[fx.Node]:
        arrived = _wait(graph, sent)
        means = emit(
            graph,
            wire_ops.from_wire.default,
            arrived,
            common,
            list(gradients),
            world,
            world,
            like=like,
        )
        return [_item(graph, means, i) for i in range(len(gradients))]

    return finish
