"""Sizes of values in between, computed from the sizes of the call.

Where tracing reads a size off a tensor, the graph would depend on that tensor for a number that
follows from the sizes of the inputs: it would be saved, sent to another stage, or kept in float32
for it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from graphopt.capture.sizes import sizes_named_apart
from graphopt.graph import Graph, value_of
from graphopt.plan import Role

aten = torch.ops.aten

_READS = (
    *(aten.sym_size.int, aten.sym_stride.int),
    *(aten.sym_numel.default, aten.sym_storage_offset.default),
)


def compute_from_inputs(graph: Graph) -> None:
    """Replace what is read off tensors, as far as the sizes of inputs tell it."""
    slots = zip(graph.inputs, graph.signature.inputs, strict=True)
    sizes = [(value_of(node), node) for node, slot in slots if slot.role is Role.SIZE]
    tracer = fx.proxy.GraphAppendingTracer(graph.fx)
    known = {
        value.node.expr: fx.Proxy(node, tracer)
        for value, node in sizes
        if isinstance(value, torch.SymInt) and value.node.expr.is_Symbol
    }
    reads = [n for target in _READS for n in graph.fx.find_nodes(op="call_function", target=target)]
    if not known or not reads:
        return
    made: dict[Any, fx.Node] = {}
    for node in reads:
        value = value_of(node)
        if not isinstance(value, torch.SymInt) or not value.node.expr.free_symbols <= known.keys():
            continue
        expression = value.node.expr
        if expression.is_number:
            continue
        if expression not in made:
            made[expression] = _made(graph, known, expression)
        node.replace_all_uses_with(made[expression])
        graph.fx.erase_node(node)
    graph.changed()


def _made(graph: Graph, known: dict[Any, fx.Proxy], expression: Any) -> fx.Node:
    """An expression of sizes as a node, in front of all operators."""
    before = set(graph.nodes)
    with sizes_named_apart(), graph.fx.inserting_before(next(graph.operators)):
        found: fx.Proxy = sympy_interp(PythonReferenceAnalysis, known, expression)
    for node in graph.nodes:
        if node not in before:
            args, kwargs = fx.map_arg((node.args, node.kwargs), value_of)
            node.meta = {"val": node.target(*args, **kwargs)}  # type: ignore[operator]
    return found.node
