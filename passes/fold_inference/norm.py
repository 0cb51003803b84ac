"""The part of fold_inference that moves a batch norm into the layer before it, or else after it.

In inference batch norm is affine per channel, ``y = (c - mean) * scale + beta`` with
``scale = gamma / sqrt(var + eps)``, and so is the convolution or linear layer that it normalises,
``c = w * x + b``. Together they are ``y = (w * scale) * x + ((b - mean) * scale + beta)``. What the
layer before cannot take up, the layer after it may (`after`).
"""

from __future__ import annotations

import operator
from collections.abc import Collection

import torch
from torch import fx

from graphopt.analysis.identity import geometry
from graphopt.graph import Graph, operator_name, value_of
from graphopt.passbase import Applied, Declined, Number, Outcome
from graphopt.passes.fold_inference.after import fold_after, match_after
from graphopt.passes.fold_inference.site import (
    LAYERS,
    NORMS,
    Site,
    name_of,
    no,
    scale_of,
    weights_of,
)
from graphopt.rewrite import arguments, emit

aten = torch.ops.aten

_PRECISE = frozenset({torch.float32, torch.float64})


def fold_norms(graph: Graph, known: set[fx.Node], mutated: Collection[fx.Node]) -> Outcome:
    """Fold every batch norm that can be folded.

    Args:
        graph: an inference graph.
        known: weights, and nodes that depend only on weights; folded weights are added.
        mutated: nodes that would belong to `known`, did the graph not change a weight of theirs.
    """
    applied: list[Applied] = []
    declined: list[Declined] = []
    for norm in [n for n in graph.operators if n.target in NORMS]:
        found = _match(norm, known, mutated)
        if isinstance(found, Declined):
            declined.append(found)
            continue
        place = "after" if found.is_before else "before"
        numbers: dict[str, Number] = {"channels": int(value_of(found.mean).shape[0])}
        applied.append(Applied(name_of(norm), f"folded into the layer {place}", numbers))
        known.update((fold_after if found.is_before else _fold)(graph, found))
    return Outcome(tuple(applied), tuple(declined))


# -- what can be folded ----------------------------------------------------------------------------


def _match(
    norm: fx.Node, known: Collection[fx.Node], mutated: Collection[fx.Node]
) -> Site | Declined:
    given = arguments(norm)
    if given.get("training") or given.get("running_mean") is None:
        return no(norm, "batch-statistics", "it normalises with the statistics of the batch")
    used = [user for user in norm.users if user.users]
    if any(user.target is not operator.getitem or user.args[1] != 0 for user in used):
        return no(norm, "statistics-used", "its statistics are read, too")
    if len(used) != 1:
        return no(norm, "unused", "nobody reads its result, or several nodes do; clean up first")
    layer = given["input"]
    if layer.target in LAYERS and len(layer.users) == 1:
        return _checked(_site(norm, used[0], layer, is_before=False), known, mutated)
    if layer.target in LAYERS:
        reason, before = "shared-result", f"{layer.name} is read by others, too"
    else:
        source = operator_name(layer) if layer.op == "call_function" else layer.name
        reason, before = "no-layer", f"its input comes from {source}"
    after = match_after(norm, used[0], before)
    if isinstance(after, Declined):
        if reason == "shared-result" and after.reason == "no-layer":
            return no(norm, reason, after.detail, {"readers": len(layer.users)})
        return after
    return _checked(_site(norm, used[0], after, is_before=True), known, mutated)


def _site(norm: fx.Node, result: fx.Node, layer: fx.Node, is_before: bool) -> Site:
    given = arguments(norm)
    weight, bias = weights_of(layer)
    return Site(
        norm=norm,
        result=result,
        layer=layer,
        is_before=is_before,
        weight=weight,
        bias=bias,
        gamma=given["weight"],
        beta=given["bias"],
        mean=given["running_mean"],
        var=given["running_var"],
        eps=given["eps"] if "eps" in given else given["epsilon"],
    )


def _checked(
    site: Site, known: Collection[fx.Node], mutated: Collection[fx.Node]
) -> Site | Declined:
    return _obstacle(site, known, mutated) or site


def _obstacle(
    site: Site, known: Collection[fx.Node], mutated: Collection[fx.Node]
) -> Declined | None:
    norm, layer = site.norm, site.layer
    unknown = [node for node in site.constants if node not in known]
    if changing := [node for node in unknown if node in mutated]:
        return no(norm, "mutated", f"the graph changes what {changing[0].name} depends on")
    if unknown:
        return no(norm, "not-constant", f"{unknown[0].name} depends on an input")
    dtypes = {value_of(node).dtype for node in (*site.constants, layer, site.result)}
    if len(dtypes) > 1 or not dtypes <= _PRECISE:
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        return no(norm, "low-precision", f"the folded weight would be rounded ({names})")
    if site.eps <= 0:
        return no(norm, "no-epsilon", "nothing bounds the scale", {"eps": site.eps})
    if layer.target is aten.addmm.default:
        factors = arguments(layer)
        if (factors["alpha"], factors["beta"]) != (1, 1):
            return no(norm, "scaled-layer", f"{layer.name} has factors of its own")
    source = arguments(norm)["input"]
    if geometry(source) != geometry(site.result):
        return no(norm, "layout", f"its result has another layout than that of {source.name}")
    return None


# -- folding ---------------------------------------------------------------------------------------


def _fold(graph: Graph, site: Site) -> tuple[fx.Node, fx.Node]:
    """Rewrite one site; returns the new weight and bias."""
    norm, layer = site.norm, site.layer
    # Statistics may be computed after the layer; only the norm reads it, so it can move.
    norm.prepend(layer)
    with graph.fx.inserting_before(layer):
        scale = scale_of(graph, site)
        aligned = _aligned(graph, site, scale)
        weight = emit(graph, aten.mul.Tensor, site.weight, aligned, like=norm)
        bias = _bias(graph, site, scale)
        if layer.target is aten.convolution.default:
            given = arguments(layer) | {"weight": weight, "bias": bias}
            layer.args, layer.kwargs = tuple(given.values()), {}
            new = layer
        else:
            matrix = arguments(layer)["self" if layer.target is aten.mm.default else "mat1"]
            new = emit(graph, aten.addmm.default, bias, matrix, weight, like=layer)
    site.result.replace_all_uses_with(new)
    for node in (*norm.users, norm, *([layer] if layer is not new else [])):
        graph.fx.erase_node(node)
    return weight, bias


def _bias(graph: Graph, site: Site, scale: fx.Node) -> fx.Node:
    if site.bias is None:
        shifted = emit(graph, aten.neg.default, site.mean, like=site.norm)
    else:
        shifted = emit(graph, aten.sub.Tensor, site.bias, site.mean, like=site.norm)
    scaled = emit(graph, aten.mul.Tensor, shifted, scale, like=site.norm)
    if site.beta is None:
        return scaled
    return emit(graph, aten.add.Tensor, scaled, site.beta, like=site.norm)


def _aligned(graph: Graph, site: Site, scale: fx.Node) -> fx.Node:
    """The scale in a shape that multiplies each output channel of the weight."""
    if site.layer.target is not aten.convolution.default:
        return scale  # columns of the second matrix
    given = arguments(site.layer)
    shape = value_of(site.weight).shape
    ones = [1] * (len(shape) - 2)
    norm = site.norm
    if not given["transposed"]:
        return emit(graph, aten.view.default, scale, [shape[0], 1, *ones], like=norm)
    # The weight is [inputs, outputs / groups, ...]; each group of inputs has outputs of its own.
    groups, outputs = given["groups"], shape[1]
    by_group = emit(graph, aten.view.default, scale, [groups, 1, outputs], like=norm)
    size = [groups, shape[0] // groups, outputs]
    by_input = emit(graph, aten.expand.default, by_group, size, like=norm)
    layout = torch.contiguous_format
    copy = emit(graph, aten.clone.default, by_input, memory_format=layout, like=norm)
    return emit(graph, aten.view.default, copy, [shape[0], outputs, *ones], like=norm)
