"""Passes for the tests of the engine: one that owns state, as K-FAC will, and one that lies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from graphopt.graph import Graph
from graphopt.passbase import EXACT, Applied, Numerics, Outcome, Pass, PassContext
from graphopt.plan import Phase, Role, Slot


@dataclass(frozen=True)
class GradientNorms(Pass):
    """Adds up the squared norm of every gradient."""

    name: ClassVar[str] = "gradient_norms"
    numerics: ClassVar[Numerics] = EXACT
    levels: ClassVar[frozenset[str]] = frozenset({"joint"})
    changes_signature: ClassVar[bool] = True

    def apply(self, graph: Graph, ctx: PassContext) -> Outcome:
        aten = torch.ops.aten
        outputs = dict(zip(graph.signature.outputs, graph.outputs, strict=True))
        applied = []
        for name in graph.signature.names(Role.GRAD):
            gradient = graph.gradient(name)
            key = f"{self.name}/{name}"
            ctx.state.setdefault(name, torch.zeros(()))
            value = gradient.meta["val"].sum()
            state = graph.add_input(Slot(Role.STATE, key, Phase.BACKWARD), value)
            state.meta["partitioner_tag"] = "is_backward"
            result = state
            with graph.fx.inserting_before(graph.output):
                squared = graph.fx.call_function(aten.mul.Tensor, (gradient, gradient))
                total = graph.fx.call_function(aten.sum.default, (squared,))
                result = graph.fx.call_function(aten.add.Tensor, (state, total))
            squared.meta["val"] = gradient.meta["val"] * gradient.meta["val"]
            for node in (squared, total, result):
                node.meta.setdefault("val", value)
                node.meta["partitioner_tag"] = "is_backward"
            outputs[Slot(Role.MUTATION, key, Phase.BACKWARD)] = result
            applied.append(Applied(name, "adds up the squared norm"))
        graph.set_outputs(outputs)
        graph.changed()
        return Outcome(tuple(applied))


@dataclass(frozen=True)
class SlightlyWrong(Pass):
    """Says that it is exact, and changes one gradient by a millionth."""

    name: ClassVar[str] = "slightly_wrong"
    numerics: ClassVar[Numerics] = EXACT

    def apply(self, graph: Graph, ctx: PassContext) -> Outcome:
        (name, *_) = graph.signature.names(Role.GRAD)
        gradient = graph.gradient(name)
        with graph.fx.inserting_before(graph.output):
            wrong = graph.fx.call_function(torch.ops.aten.mul.Tensor, (gradient, 1 + 1e-6))
        wrong.meta.update(gradient.meta)
        graph.output.replace_input_with(gradient, wrong)
        return Outcome((Applied(name, "scaled"),))
