"""The part of fold_inference that marks the weights that layers read.

CPUs have kernels that read a weight in a layout of their own. Which layers get one is decided by
what runs the graph; the mark says that it may.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import fx
from torch._ops import OpOverload

from graphopt.analysis.cost import tensor_bytes
from graphopt.graph import Graph, value_of
from graphopt.passbase import Applied, Outcome
from graphopt.passes.fold_inference.freeze import FROZEN
from graphopt.plan import Slot
from graphopt.rewrite import emit

aten = torch.ops.aten

_WEIGHTS = {aten.convolution.default: 1, aten.mm.default: 1, aten.addmm.default: 2}
_VIEWS = frozenset({aten.t.default, aten.permute.default, aten.view.default})
_DTYPES = frozenset({torch.float32, torch.bfloat16})


def mark_weights(graph: Graph, weights: Mapping[fx.Node, Slot]) -> Outcome:
    """Put ``graphopt.frozen`` between a weight and the convolutions and products that read it.

    Args:
        graph: an inference graph.
        weights: parameters and buffers that the graph leaves alone.
    """
    marked: dict[fx.Node, fx.Node] = {}
    for node in [n for n in graph.operators if n.target in _WEIGHTS]:
        reader, weight = node, node.args[_WEIGHTS[cast("OpOverload", node.target)]]
        while isinstance(weight, fx.Node) and weight.target in _VIEWS:
            reader, weight = weight, weight.args[0]
        if not isinstance(weight, fx.Node) or weight not in weights:
            continue
        value = value_of(weight)
        if value.device.type != "cpu" or value.dtype not in _DTYPES:
            continue
        if weight not in marked:
            first = next(n for n in graph.nodes if n.op != "placeholder")
            with graph.fx.inserting_before(first):
                marked[weight] = emit(graph, FROZEN, weight, like=node)
        reader.replace_input_with(weight, marked[weight])
    return Outcome(
        tuple(
            Applied(weights[n].name, "kept for its layers", {"bytes": tensor_bytes(value_of(n))})
            for n in marked
        ),
        (),
    )
