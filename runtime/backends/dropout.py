"""Dropout on CPUs in the operators that eager calls, with a mask of one byte per number.

The graph's operator multiplies numbers by truth values. PyTorch turns these into numbers one by
one, which takes far longer than the product of numbers; of bytes it turns many at once. So
noise is drawn as eager draws it, its zeros and ones are kept as truth values, and the backward
reads them as bytes. Eager keeps the noise itself, four times as many bytes, and has the same bits.
"""

from __future__ import annotations

import operator
from typing import Any, cast

import torch
from torch import Tensor, fx

aten = torch.ops.aten


def expand_dropout(graph: fx.Graph) -> None:
    """Replace dropouts of `graph` and their backward by what eager computes."""
    for node in graph.find_nodes(op="call_function", target=aten.native_dropout.default):
        if _on_cpu(node.args[0]) and _is_plain(node):
            with graph.inserting_before(node):
                _forward(graph, node)
    for node in graph.find_nodes(op="call_function", target=aten.native_dropout_backward.default):
        if all(map(_on_cpu, node.args[:2])) and type(node.args[2]) is float:
            with graph.inserting_before(node):
                _backward(graph, node)


def _on_cpu(node: Any) -> bool:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return isinstance(value, Tensor) and value.device.type == "cpu"


def _is_plain(node: fx.Node) -> bool:
    """Whether numbers are drawn, and with a share that is known."""
    _, share, is_training = node.args
    return (
        type(share) is float
        and 0 < share < 1
        and is_training is True
        and all(user.target is operator.getitem for user in node.users)
    )


def _forward(graph: fx.Graph, node: fx.Node) -> None:
    x, share = cast("tuple[fx.Node, float]", node.args[:2])
    value: Tensor = x.meta["val"]
    noise = _call(graph, aten.empty_like.default, x, val=torch.empty_like(value))
    _call(graph, aten.bernoulli_.float, noise, 1 - share, val=noise.meta["val"])
    results = {user.args[1]: user for user in node.users}
    if kept := results.pop(1, None):
        mask = _call(graph, aten._to_copy.default, noise, dtype=torch.bool, val=kept.meta["val"])
        _replace(graph, kept, mask)
    _call(graph, aten.div_.Scalar, noise, 1 - share, val=noise.meta["val"])
    if dropped := results.pop(0, None):
        product = _call(graph, aten.mul.Tensor, x, noise, val=dropped.meta["val"])
        _replace(graph, dropped, product)
    graph.erase_node(node)


def _backward(graph: fx.Graph, node: fx.Node) -> None:
    gradient, mask, scale = cast("tuple[fx.Node, fx.Node, float]", node.args)
    # Times zero or one is exact, so that the product has one rounding, as with scaled noise.
    as_bytes = mask.meta["val"].view(torch.uint8)
    read = _call(graph, aten.view.dtype, mask, torch.uint8, val=as_bytes)
    product = _call(graph, aten.mul.Tensor, gradient, read, val=node.meta["val"])
    _call(graph, aten.mul_.Scalar, product, scale, val=node.meta["val"])
    _replace(graph, node, product)


def _call(graph: fx.Graph, target: Any, *args: Any, val: Any, **kwargs: Any) -> fx.Node:
    node = graph.call_function(target, args, kwargs)
    node.meta["val"] = val
    return node


def _replace(graph: fx.Graph, old: fx.Node, new: fx.Node) -> None:
    old.replace_all_uses_with(new)
    graph.erase_node(old)
