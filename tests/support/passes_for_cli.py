"""Passes that break their word or decline, offered as plugins to the command line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from graphopt.graph import Graph
from graphopt.passbase import Applied, Declined, Numerics, Outcome, Pass, PassContext, lowered
from graphopt.plan import Role


def scale_first_output(graph: Graph, factor: float) -> Outcome:
    """Multiply what the model returns, its gradients left as they are."""
    node = graph.outputs[graph.signature.output_index(Role.OUTPUT, "0")]
    with graph.fx.inserting_after(node):
        scaled = graph.fx.call_function(torch.ops.aten.mul.Tensor, (node, factor))
    scaled.meta.update(node.meta)
    graph.output.args = ([scaled if n is node else n for n in graph.outputs],)
    return Outcome((Applied(node.name, "scaled", {"factor": factor}),))


@dataclass(frozen=True)
class Liar(Pass):
    """Says that it is exact and is not."""

    name: ClassVar[str] = "liar"

    def apply(self, graph: Graph, ctx: PassContext) -> Outcome:
        return scale_first_output(graph, 1.001)


@dataclass(frozen=True)
class Coarse(Pass):
    """Does the same as `Liar` and says so."""

    name: ClassVar[str] = "coarse"
    numerics: ClassVar[Numerics] = lowered(0.01)

    def apply(self, graph: Graph, ctx: PassContext) -> Outcome:
        return scale_first_output(graph, 1.001)


@dataclass(frozen=True)
class Shy(Pass):
    """Declines every parameter."""

    name: ClassVar[str] = "shy"

    def apply(self, graph: Graph, ctx: PassContext) -> Outcome:
        return Outcome(
            declined=tuple(
                Declined(name, "too-small", "it is not worth it", {"gain": float("inf")})
                for name in graph.signature.names(Role.PARAM)
            )
        )


@dataclass(frozen=True)
class JointOnly(Pass):
    """Has nothing to do on inference graphs."""

    name: ClassVar[str] = "joint_only"
    levels: ClassVar[frozenset[str]] = frozenset({"joint"})

    def apply(self, graph: Graph, ctx: PassContext) -> Outcome:
        return Outcome()


ALL = (Liar, Coarse, Shy, JointOnly)
