"""The part of fold_inference that moves a batch norm into the layer after it.

The norm is affine per channel, ``c = x * scale + shift`` with ``shift = beta - mean * scale``, and
the layer reads its channels, ``y = w * c + b``. Together they are
``y = (w * scale) * x + (b + sum w * shift)``: each result sees every shift once, unless the layer
pads with zeros, which are not shifted. A function between the two, such as ReLU, is not affine.
"""

from __future__ import annotations

import torch
from torch import fx

from graphopt.graph import Graph, operator_name, value_of
from graphopt.passbase import Declined
from graphopt.passes.fold_inference.site import LAYERS, Site, no, scale_of, weights_of
from graphopt.rewrite import arguments, emit

aten = torch.ops.aten


def match_after(norm: fx.Node, result: fx.Node, before: str) -> fx.Node | Declined:
    """The layer that can take up a norm whose result it reads.

    Args:
        norm: the batch norm.
        result: its normalised values.
        before: why the layer before it cannot take it up, as a part of a sentence.
    """
    if len(result.users) != 1:
        return no(norm, "no-layer", f"{before}, and {len(result.users)} nodes read its result")
    (layer,) = result.users
    if layer.op != "call_function":
        return no(norm, "no-layer", f"{before}, and its result is returned")
    if layer.target not in LAYERS:
        if any(user.target in LAYERS for user in layer.users):
            detail = f"{before}, and {operator_name(layer)} stands between it and the next layer"
            return no(norm, "function-between", detail)
        return no(norm, "no-layer", f"{before}, and its result goes to {operator_name(layer)}")
    if data_of(layer) is not result or result in weights_of(layer):
        return no(norm, "no-layer", f"{before}, and {layer.name} reads its result as a weight")
    if layer.target is aten.convolution.default:
        given = arguments(layer)
        if given["transposed"]:
            return no(norm, "transposed", f"{before}, and {layer.name} after it is transposed")
        if any(given["padding"]):
            detail = f"{before}, and {layer.name} after it pads with zeros that are not shifted"
            return no(norm, "padding", detail)
    return layer


def data_of(layer: fx.Node) -> object:
    """What a layer multiplies its weight with."""
    given = arguments(layer)
    return next(given[name] for name in ("input", "mat1", "self") if name in given)


def fold_after(graph: Graph, site: Site) -> tuple[fx.Node, fx.Node]:
    """Rewrite one site whose layer comes after the norm; returns the new weight and bias."""
    norm, layer = site.norm, site.layer
    source = arguments(norm)["input"]
    is_convolution = layer.target is aten.convolution.default
    with graph.fx.inserting_before(layer):
        scale = scale_of(graph, site)
        moved = emit(graph, aten.mul.Tensor, site.mean, scale, like=norm)
        if site.beta is None:
            shift = emit(graph, aten.neg.default, moved, like=norm)
        else:
            shift = emit(graph, aten.sub.Tensor, site.beta, moved, like=norm)
        weight = emit(graph, aten.mul.Tensor, site.weight, _aligned(graph, site, scale), like=norm)
        shifts = emit(graph, aten.mul.Tensor, site.weight, _aligned(graph, site, shift), like=norm)
        summed = list(range(1, value_of(site.weight).dim())) if is_convolution else [0]
        bias = emit(graph, aten.sum.dim_IntList, shifts, summed, like=norm)
        if site.bias is not None:
            bias = emit(graph, aten.add.Tensor, site.bias, bias, like=norm)
        if is_convolution:
            given = arguments(layer) | {"input": source, "weight": weight, "bias": bias}
            layer.args, layer.kwargs = tuple(given.values()), {}
        else:
            new = emit(graph, aten.addmm.default, bias, source, weight, like=layer)
            layer.replace_all_uses_with(new)
    for node in (*([] if is_convolution else [layer]), *norm.users, norm):
        graph.fx.erase_node(node)
    return weight, bias


def _aligned(graph: Graph, site: Site, values: fx.Node) -> fx.Node:
    """Values per channel in a shape that multiplies each input channel of the weight."""
    norm, shape = site.norm, value_of(site.weight).shape
    if site.layer.target is not aten.convolution.default:
        return emit(graph, aten.view.default, values, [shape[0], 1], like=norm)
    # The weight is [outputs, inputs / groups, ...]; each group of outputs reads inputs of its own.
    groups, ones = arguments(site.layer)["groups"], [1] * (len(shape) - 2)
    if groups == 1:
        return emit(graph, aten.view.default, values, [1, shape[1], *ones], like=norm)
    by_group = emit(graph, aten.view.default, values, [groups, 1, shape[1]], like=norm)
    size = [groups, shape[0] // groups, shape[1]]
    by_output = emit(graph, aten.expand.default, by_group, size, like=norm)
    layout = torch.contiguous_format
    copy = emit(graph, aten.clone.default, by_output, memory_format=layout, like=norm)
    return emit(graph, aten.view.default, copy, [shape[0], shape[1], *ones], like=norm)
