"""Run layers with frozen weights through kernels that read the weight in their own layout.

oneDNN and MKL reorder the weight of a layer at every call, unless they get it reordered. Here the
prologue does that, once per set of weights. Each shape of layer is measured first: where the plain
kernel is as fast, the layer stays what it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.runtime.frozen.fusions import FUSED
from graphopt.runtime.frozen.prologue import Hoisted, reads_constant
from graphopt.runtime.frozen.sites import Linear

aten = torch.ops.aten
mkldnn = torch.ops.mkldnn
mkl = torch.ops.mkl


@dataclass
class Packed:
    """What was packed.

    Attributes:
        weights: placeholders of values that only packed kernels read.
        convolutions: the nodes that took the place of fused convolutions.
        linears: those that took the place of products.
    """

    weights: list[fx.Node] = field(default_factory=list)
    convolutions: list[fx.Node] = field(default_factory=list)
    linears: list[fx.Node] = field(default_factory=list)


def pack(hoisted: Hoisted, linears: Sequence[Linear], sums: bool) -> Packed:
    """Put packed kernels in the place of fused convolutions and of products with weights.

    Args:
        hoisted: changed in place.
        linears: the products to pack.
        sums: let the kernel of a convolution do the addition, too; else it stays an operator, for
            a compiler that knows where it may write the sum.
    """
    packed = Packed()
    for node in hoisted.main.graph.find_nodes(op="call_function", target=FUSED):
        _convolution(hoisted, node, sums, packed)
    for linear in linears:
        _linear(hoisted, linear, packed)
    hoisted.main.graph.eliminate_dead_code()
    return packed


def _convolution(hoisted: Hoisted, node: fx.Node, sums: bool, packed: Packed) -> None:
    x, weight, bias, stride, padding, dilation, groups, other, *post = node.args
    size = [n if isinstance(n, int) else None for n in x.meta["val"].shape]  # type: ignore[union-attr]
    given = None if None in size else size
    reorder = mkldnn._reorder_convolution_weight.default
    arguments = (padding, stride, dilation, groups, given)
    reordered = _kept(hoisted, weight, reorder, arguments)
    packed.weights.append(reordered)
    graph = hoisted.main.graph
    geometry = (padding, stride, dilation, groups)
    name, scalars, _ = post
    with graph.inserting_before(node):
        if other is None:
            kernel = mkldnn._convolution_pointwise.default
            new = graph.call_function(kernel, (x, reordered, bias, *geometry, *post))
            new.meta = dict(node.meta)
            packed.convolutions.append(new)
        elif sums:
            after = ("add", 1.0, None if name == "none" else name, scalars, None)
            kernel = mkldnn._convolution_pointwise.binary
            new = graph.call_function(kernel, (x, other, reordered, bias, *geometry, *after))
            new.meta = dict(node.meta)
            packed.convolutions.append(new)
        else:
            kernel = mkldnn._convolution_pointwise.default
            bare = graph.call_function(kernel, (x, reordered, bias, *geometry, "none", [], ""))
            packed.convolutions.append(bare)
            new = graph.call_function(aten.add.Tensor, (bare, other))
            bare.meta, new.meta = dict(node.meta), dict(node.meta)
            if name == "relu":
                new = graph.call_function(aten.relu.default, (new,))
                new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    graph.erase_node(node)


def _linear(hoisted: Hoisted, linear: Linear, packed: Packed) -> None:
    node, graph = linear.node, hoisted.main.graph
    rows = int(linear.x.meta["val"].shape[0])
    # A copy: a kept value must not hold the memory of the user's weight.
    rows_first = _kept(hoisted, linear.weight, aten.permute.default, ([1, 0],))
    plain = _more(hoisted, rows_first, aten.clone.default, ())
    if node.meta["val"].dtype is torch.float32:
        reordered = _more(hoisted, plain, mkl._mkl_reorder_linear_weight.default, (rows,))
        packed.weights += [reordered, plain]
        kernel = mkl._mkl_linear.default
        arguments: tuple[Any, ...] = (linear.x, reordered, plain, linear.bias, rows)
    else:
        reordered = _more(hoisted, plain, mkldnn._reorder_linear_weight.default, (rows,))
        packed.weights.append(reordered)
        kernel = mkldnn._linear_pointwise.default
        arguments = (linear.x, reordered, linear.bias, "none", [], "")
    with graph.inserting_before(node):
        new = graph.call_function(kernel, arguments)
    new.meta = dict(node.meta)
    packed.linears.append(new)
    node.replace_all_uses_with(new)
    graph.erase_node(node)


def _kept(hoisted: Hoisted, weight: Any, target: Any, arguments: tuple[Any, ...]) -> fx.Node:
    """A kept value of a weight, which may be views of a kept value."""
    found = reads_constant(weight, hoisted.kept)
    assert found is not None
    value, views = found
    fake: Tensor = weight.meta["val"]
    if target is aten.permute.default:
        fake = fake.t()

    def make(graph: fx.Graph, node: fx.Node) -> fx.Node:
        for view in views:
            node = graph.call_function(view.target, (node, *view.args[1:]), view.kwargs)  # type: ignore[arg-type]
            node.meta["val"] = view.meta["val"]
        return graph.call_function(target, (node, *arguments))

    return hoisted.keep(make, value, fake)


def _more(hoisted: Hoisted, value: fx.Node, target: Any, arguments: tuple[Any, ...]) -> fx.Node:
    def make(graph: fx.Graph, node: fx.Node) -> fx.Node:
        return graph.call_function(target, (node, *arguments))

    return hoisted.keep(make, value, value.meta["val"])
