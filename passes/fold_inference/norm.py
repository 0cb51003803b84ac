"""The part of fold_inference that moves a batch norm into the layer before it.

In inference batch norm is affine per channel, ``y = (c - mean) * scale + beta`` with
``scale = gamma / sqrt(var + eps)``, and so is the convolution or linear layer that it normalises,
``c = w * x + b``. Together they are ``y = (w * scale) * x + ((b - mean) * scale + beta)``.
"""

from __future__ import annotations

import operator
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import fx

from graphopt.analysis.identity import geometry
from graphopt.graph import Graph, module_of, operator_name, value_of
from graphopt.passbase import Applied, Declined, Number, Outcome
from graphopt.rewrite import arguments, emit

aten = torch.ops.aten

_NORMS = frozenset(
    {
        aten._native_batch_norm_legit_no_training.default,
        aten._native_batch_norm_legit.no_stats,
        aten._batch_norm_no_update.default,
        aten.native_batch_norm.default,
        aten.cudnn_batch_norm.default,
        aten.miopen_batch_norm.default,
    }
)
_LAYERS = frozenset({aten.convolution.default, aten.addmm.default, aten.mm.default})
_PRECISE = frozenset({torch.float32, torch.float64})


@dataclass(frozen=True)
class _Site:
    """A batch norm and the layer before it."""

    norm: fx.Node
    result: fx.Node
    layer: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    gamma: fx.Node | None
    beta: fx.Node | None
    mean: fx.Node
    var: fx.Node
    eps: float

    @property
    def constants(self) -> list[fx.Node]:
        """Everything that has to be known before the step."""
        found = (self.weight, self.bias, self.gamma, self.beta, self.mean, self.var)
        return [node for node in found if node is not None]


def fold_norms(graph: Graph, known: set[fx.Node], mutated: Collection[fx.Node]) -> Outcome:
    """Fold every batch norm that can be folded.

    Args:
        graph: an inference graph.
        known: weights, and nodes that depend only on weights; folded weights are added.
        mutated: nodes that would belong to `known`, did the graph not change a weight of theirs.
    """
    applied: list[Applied] = []
    declined: list[Declined] = []
    for norm in [n for n in graph.operators if n.target in _NORMS]:
        found = _match(norm)
        no = found if isinstance(found, Declined) else _obstacle(found, known, mutated)
        if no or isinstance(found, Declined):
            declined += [no] if no else []
            continue
        channels = int(value_of(found.mean).shape[0])
        applied.append(Applied(_name(norm), "folded into the layer before", {"channels": channels}))
        known.update(_fold(graph, found))
    return Outcome(tuple(applied), tuple(declined))


# -- what can be folded ----------------------------------------------------------------------------


def _match(norm: fx.Node) -> _Site | Declined:
    given = arguments(norm)
    if given.get("training") or given.get("running_mean") is None:
        return _no(norm, "batch-statistics", "it normalises with the statistics of the batch")
    used = [user for user in norm.users if user.users]
    if any(user.target is not operator.getitem or user.args[1] != 0 for user in used):
        return _no(norm, "statistics-used", "its statistics are read, too")
    if len(used) != 1:
        return _no(norm, "unused", "nobody reads its result, or several nodes do; clean up first")
    layer = given["input"]
    if layer.target not in _LAYERS:
        return _no(norm, "no-layer", f"its input comes from {operator_name(layer)}")
    weight, bias = _weights(layer)
    return _Site(
        norm=norm,
        result=used[0],
        layer=layer,
        weight=weight,
        bias=bias,
        gamma=given["weight"],
        beta=given["bias"],
        mean=given["running_mean"],
        var=given["running_var"],
        eps=given["eps"] if "eps" in given else given["epsilon"],
    )


def _weights(layer: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    given = arguments(layer)
    if layer.target is aten.convolution.default:
        return given["weight"], given["bias"]
    return given["mat2"], given["self"] if layer.target is aten.addmm.default else None


def _obstacle(
    site: _Site, known: Collection[fx.Node], mutated: Collection[fx.Node]
) -> Declined | None:
    norm, layer = site.norm, site.layer
    if len(layer.users) > 1:
        readers: dict[str, Number] = {"readers": len(layer.users)}
        return _no(norm, "shared-result", f"{layer.name} is read by others, too", readers)
    unknown = [node for node in site.constants if node not in known]
    if changing := [node for node in unknown if node in mutated]:
        return _no(norm, "mutated", f"the graph changes what {changing[0].name} depends on")
    if unknown:
        return _no(norm, "not-constant", f"{unknown[0].name} depends on an input")
    dtypes = {value_of(node).dtype for node in (*site.constants, layer, site.result)}
    if len(dtypes) > 1 or not dtypes <= _PRECISE:
        names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        return _no(norm, "low-precision", f"the folded weight would be rounded ({names})")
    if site.eps <= 0:
        return _no(norm, "no-epsilon", "nothing bounds the scale", {"eps": site.eps})
    if layer.target is aten.addmm.default:
        factors = arguments(layer)
        if (factors["alpha"], factors["beta"]) != (1, 1):
            return _no(norm, "scaled-layer", f"{layer.name} has factors of its own")
    if geometry(layer) != geometry(site.result):
        return _no(norm, "layout", f"its result has another layout than that of {layer.name}")
    return None


def _name(norm: fx.Node) -> str:
    return module_of(norm) or norm.name


def _no(
    norm: fx.Node, reason: str, detail: str, numbers: dict[str, Number] | None = None
) -> Declined:
    return Declined(_name(norm), reason, detail, numbers or {})


# -- folding ---------------------------------------------------------------------------------------


def _fold(graph: Graph, site: _Site) -> tuple[fx.Node, fx.Node]:
    """Rewrite one site; returns the new weight and bias."""
    norm, layer = site.norm, site.layer
    # Statistics may be computed after the layer; only the norm reads it, so it can move.
    norm.prepend(layer)
    with graph.fx.inserting_before(layer):
        scale = _scale(graph, site)
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


def _scale(graph: Graph, site: _Site) -> fx.Node:
    shifted = emit(graph, aten.add.Tensor, site.var, site.eps, like=site.norm)
    inverse = emit(graph, aten.rsqrt.default, shifted, like=site.norm)
    if site.gamma is None:
        return inverse
    return emit(graph, aten.mul.Tensor, site.gamma, inverse, like=site.norm)


def _bias(graph: Graph, site: _Site, scale: fx.Node) -> fx.Node:
    if site.bias is None:
        shifted = emit(graph, aten.neg.default, site.mean, like=site.norm)
    else:
        shifted = emit(graph, aten.sub.Tensor, site.bias, site.mean, like=site.norm)
    scaled = emit(graph, aten.mul.Tensor, shifted, scale, like=site.norm)
    if site.beta is None:
        return scaled
    return emit(graph, aten.add.Tensor, scaled, site.beta, like=site.norm)


def _aligned(graph: Graph, site: _Site, scale: fx.Node) -> fx.Node:
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
