"""A pass that makes the backward of convolutions in float16 bearable on CPUs."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from graphopt import Applied, Graph, Outcome, Pass, PassContext
from graphopt.graph import value_of
from graphopt.passbase import Numerics, lowered
from graphopt.rewrite import emit

_BACKWARD = torch.ops.aten.convolution_backward.default
_CAST = torch.ops.aten._to_copy.default


@dataclass(frozen=True)
class HalfOnCpu(Pass):
    """Compute the backward of float16 convolutions in float32, and round what comes out.

    That is what processors with products of float16 and sums in float32 do. PyTorch 2.13 has no
    fast kernel for it on CPUs and takes about fifty times as long as in float32.
    """

    name: ClassVar[str] = "half_on_cpu"
    numerics: ClassVar[Numerics] = lowered(2.0**-8)

    def apply(self, graph: Graph, ctx: PassContext) -> Outcome:
        """Put casts around each."""
        applied = []
        for node in [n for n in graph.operators if n.target is _BACKWARD]:
            low = [a for a in node.args[:3] if isinstance(a, fx.Node)]
            if any(value_of(a).dtype is not torch.float16 for a in low):
                continue
            with graph.fx.inserting_before(node):
                for value in low:
                    cast = emit(graph, _CAST, value, dtype=torch.float32, like=node)
                    node.replace_input_with(value, cast)
            args, kwargs = fx.map_arg((node.args, node.kwargs), value_of)
            node.meta["val"] = _BACKWARD(*args, **kwargs)
            for part in list(node.users):
                assert part.target is operator.getitem
                part.meta["val"] = node.meta["val"][part.args[1]]
                with graph.fx.inserting_after(part):
                    rounded = emit(graph, _CAST, part, dtype=torch.float16, like=part)
                part.replace_all_uses_with(
                    rounded, delete_user_cb=lambda user, r=rounded: user is not r
                )
            applied.append(Applied(node.name, "computes in float32"))
        if applied:
            graph.changed()
        return Outcome(tuple(applied))
