"""A batch norm of an inference graph, and the layer that can take it up."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from graphopt.graph import Graph, module_of
from graphopt.passbase import Declined, Number
from graphopt.rewrite import arguments, emit

aten = torch.ops.aten

NORMS = frozenset(
    {
        aten._native_batch_norm_legit_no_training.default,
        aten._native_batch_norm_legit.no_stats,
        aten._batch_norm_no_update.default,
        aten.native_batch_norm.default,
        aten.cudnn_batch_norm.default,
        aten.miopen_batch_norm.default,
    }
)
LAYERS = frozenset({aten.convolution.default, aten.addmm.default, aten.mm.default})


@dataclass(frozen=True)
class Site:
    """A batch norm and the layer that takes it up.

    Attributes:
        is_before: the norm comes before the layer, which reads its result.
    """

    norm: fx.Node
    result: fx.Node
    layer: fx.Node
    is_before: bool
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


def weights_of(layer: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    """Weight and bias of a layer."""
    given = arguments(layer)
    if layer.target is aten.convolution.default:
        return given["weight"], given["bias"]
    return given["mat2"], given["self"] if layer.target is aten.addmm.default else None


def scale_of(graph: Graph, site: Site) -> fx.Node:
    """What a norm multiplies with, computed at the insertion point."""
    shifted = emit(graph, aten.add.Tensor, site.var, site.eps, like=site.norm)
    inverse = emit(graph, aten.rsqrt.default, shifted, like=site.norm)
    if site.gamma is None:
        return inverse
    return emit(graph, aten.mul.Tensor, site.gamma, inverse, like=site.norm)


def name_of(norm: fx.Node) -> str:
    """How the report calls a norm."""
    return module_of(norm) or norm.name


def no(
    norm: fx.Node, reason: str, detail: str, numbers: dict[str, Number] | None = None
) -> Declined:
    """A norm that is not folded."""
    return Declined(name_of(norm), reason, detail, numbers or {})
