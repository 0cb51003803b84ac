"""Run the forward half of a graph so that the gradient of every value in it can be asked for.

The joint graph has gradients of parameters only; of values in between it has what its rewritten
backward happens to need. Autograd differentiates the forward half's ATen operators anew, and tells
apart the readers of a value.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.graph import Graph, phase_of, value_of
from graphopt.plan import Phase, Role


@dataclass
class Recorded:
    """One run of a forward half, connected to autograd.

    Attributes:
        outputs: the model's outputs by position.
        results: float32 tensors that operators made, by operator; of views none.
        reads: float32 tensors that operators read, by value and reader: aliases of the value, so
            that each has the gradient that passes through this reader alone.
    """

    outputs: dict[int, Tensor] = field(default_factory=dict)
    results: dict[fx.Node, list[Tensor]] = field(default_factory=dict)
    reads: dict[tuple[fx.Node, fx.Node], Tensor] = field(default_factory=dict)


def record_forward(graph: Graph, views: frozenset[fx.Node], inputs: Sequence[Tensor]) -> Recorded:
    """Run what the outputs are made of.

    Args:
        graph: as captured and cleaned; nothing in it writes in place.
        views: its nodes that neither compute nor copy.
        inputs: one tensor per input that is not a tangent.
    """
    found, values = Recorded(), {}
    slots = zip(graph.signature.inputs, graph.inputs, strict=True)
    primal = [(slot, node) for slot, node in slots if slot.role is not Role.TANGENT]
    for (slot, node), tensor in zip(primal, inputs, strict=True):
        own = tensor.detach()
        wanted = slot.role in (Role.PARAM, Role.INPUT) and own.is_floating_point()
        values[node] = own.requires_grad_() if wanted else own
    for node in _needed(graph):
        if node.op == "get_attr":
            values[node] = operator.attrgetter(str(node.target))(graph.module)
        elif node.op == "call_function":
            values[node] = _call(node, values, found, node in views)
            if node not in views:
                found.results[node] = [values[node]] if is_float32(values[node]) else []
            elif node.target is operator.getitem and is_float32(values[node]):
                found.results.setdefault(node.all_input_nodes[0], []).append(values[node])
    for slot, node in zip(graph.signature.outputs, graph.outputs, strict=True):
        if slot.role is Role.OUTPUT:
            found.outputs[int(slot.name)] = values[node]
    return found


def is_float32(value: object) -> bool:
    """Whether this is one float32 tensor."""
    return isinstance(value, Tensor) and value.dtype is torch.float32


def _needed(graph: Graph) -> list[fx.Node]:
    """The forward nodes that outputs depend on, in order."""
    slots = zip(graph.signature.outputs, graph.outputs, strict=True)
    todo = [node for slot, node in slots if slot.role is Role.OUTPUT]
    needed: set[fx.Node] = set()
    while todo:
        node = todo.pop()
        if node not in needed:
            needed.add(node)
            todo.extend(node.all_input_nodes)
    return [n for n in graph.nodes if n in needed and phase_of(n) is Phase.FORWARD]


def _call(node: fx.Node, values: dict[fx.Node, Any], found: Recorded, is_view: bool) -> Any:
    def operand(source: fx.Node) -> Any:
        value = values[source]
        if not is_float32(value) or value_of(source).dim() == 0:
            return value
        if (source, node) not in found.reads:
            alias = value.view_as(value) if value.requires_grad else value
            found.reads[source, node] = alias
        return found.reads[source, node]

    args, kwargs = fx.map_arg((node.args, node.kwargs), operand)
    return node.target(*args, **kwargs)  # type: ignore[operator]
