"""Run convolutions with frozen weights through packed, fused CPU kernels.

A convolution and the addition and ReLU after it become one `graphopt::packed_convolution`, and the
values between such kernels stay in channels-last layout. Before any operator that depends on the
layout the value is made contiguous again, so the module's results keep their strides.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from graphopt.analysis.fakes import keeping_symbols
from graphopt.ops.convolution import available

aten = torch.ops.aten

# Correct in any layout; the result has the layout of the argument.
FOLLOW = {
    aten.relu.default,
    aten.add.Tensor,
    aten.mul.Tensor,
    aten.sub.Tensor,
    aten.sigmoid.default,
    aten.silu.default,
    aten.hardtanh.default,
    aten.max_pool2d_with_indices.default,
    aten.avg_pool2d.default,
}
# Correct in any layout; the result has a layout of its own.
REDUCE = {aten.mean.dim, aten.sum.dim_IntList, aten.amax.default}


def pack_convolutions(module: fx.GraphModule, frozen: set[str]) -> int:
    """Rewrite a module in place.

    Args:
        module: an inference module.
        frozen: names of the placeholders that hold frozen values.

    Returns:
        How many convolutions were rewritten.
    """
    graph = module.graph
    packed: set[fx.Node] = set()
    if available():
        for node in list(graph.nodes):
            if _packable(node, frozen):
                packed.add(_pack(graph, node))
    if packed:
        _keep_layouts(graph, packed)
        graph.lint()
        module.recompile()
    return len(packed)


def _packable(node: fx.Node, frozen: set[str]) -> bool:
    if node.target is not aten.convolution.default or not node.users:
        return False
    x, weight, _, _, _, _, transposed = node.args[:7]
    value: Tensor = node.meta["val"]
    return (
        isinstance(x, fx.Node)
        and isinstance(weight, fx.Node)
        and weight.name in frozen
        and not transposed
        and value.dim() == 4
        and value.dtype == torch.float32
        and value.device.type == "cpu"
    )


def _pack(graph: fx.Graph, convolution: fx.Node) -> fx.Node:
    x, weight, bias, stride, padding, dilation, _, _, groups = convolution.args
    last, other = convolution, None
    addition = _only_user(last, aten.add.Tensor)
    if addition is not None and not addition.kwargs:
        a, b = addition.args
        rest = b if a is convolution else a
        if isinstance(rest, fx.Node) and rest is not convolution and _alike(rest, last):
            last, other = addition, rest
    relu = _only_user(last, aten.relu.default)
    last = relu or last
    with graph.inserting_before(last):
        arguments = (x, weight, bias, stride, padding, dilation, groups, other, relu is not None)
        fused = graph.call_function(torch.ops.graphopt.packed_convolution.default, arguments)
    fused.meta = {**last.meta, "val": _in_layout(last, torch.channels_last)}
    last.replace_all_uses_with(fused)
    for node in dict.fromkeys((last, *([addition] if other is not None else []), convolution)):
        if node is not None and not node.users:
            graph.erase_node(node)
    return fused


def _in_layout(node: fx.Node, layout: torch.memory_format) -> Tensor:
    value: Tensor = node.meta["val"]
    with keeping_symbols([value]):
        return torch.empty_like(value, memory_format=layout)


def _only_user(node: fx.Node, target: Any) -> fx.Node | None:
    if len(node.users) != 1:
        return None
    (user,) = node.users
    return user if user.target is target else None


def _alike(a: fx.Node, b: fx.Node) -> bool:
    x, y = a.meta["val"], b.meta["val"]
    if not isinstance(x, Tensor) or x.dim() != y.dim() or x.dtype != y.dtype:
        return False
    return all(statically_known_true(n == m) for n, m in zip(x.shape, y.shape, strict=True))


def _keep_layouts(graph: fx.Graph, packed: set[fx.Node]) -> None:
    """Make channels-last values contiguous before operators that depend on the layout."""
    channels_last = set(packed)
    for node in list(graph.nodes):
        arguments = [n for n in node.all_input_nodes if n in channels_last]
        if not arguments or node in packed or node.target in REDUCE:
            continue
        if node.target in FOLLOW or node.target is operator.getitem:
            channels_last.add(node)
            continue
        for argument in arguments:
            with graph.inserting_before(node):
                contiguous = graph.call_function(
                    aten.clone.default, (argument,), {"memory_format": torch.contiguous_format}
                )
            contiguous.meta = {
                **argument.meta,
                "val": _in_layout(argument, torch.contiguous_format),
            }
            node.replace_input_with(argument, contiguous)
