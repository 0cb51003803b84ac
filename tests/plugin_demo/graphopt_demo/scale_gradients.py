"""`scale_gradients`: multiply every gradient by a constant."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from graphopt.graph import value_of
from graphopt.passbase import ALGORITHM, Applied, Declined, Numerics, Outcome, Pass, PassContext
from graphopt.plan import Role

if TYPE_CHECKING:
    from graphopt.graph import Graph

MUL = torch.ops.aten.mul.Tensor


@dataclass(frozen=True)
class ScaleGradients(Pass):
    """Multiplies every gradient by `factor`, as training with a loss scaled by it does.

    Attributes:
        factor: what gradients are multiplied by; at 1 there is nothing to do.
    """

    name: ClassVar[str] = "scale_gradients"
    numerics: ClassVar[Numerics] = ALGORITHM
    levels: ClassVar[frozenset[str]] = frozenset({"joint"})

    factor: float = 0.5

    def apply(self, graph: Graph, ctx: PassContext) -> Outcome:
        """Put one multiplication in front of each gradient output."""
        names = graph.signature.names(Role.GRAD)
        if self.factor == 1:
            detail = "Multiplying by 1 changes nothing."
            return Outcome(declined=tuple(Declined(n, "factor-is-one", detail) for n in names))
        outputs = dict(zip(graph.signature.outputs, graph.outputs, strict=True))
        for slot, gradient in outputs.items():
            if slot.role is Role.GRAD:
                with graph.fx.inserting_before(graph.output):
                    scaled = graph.fx.call_function(MUL, (gradient, self.factor))
                scaled.meta["val"] = MUL(value_of(gradient), self.factor)
                scaled.meta["partitioner_tag"] = "is_backward"
                outputs[slot] = scaled
        graph.set_outputs(outputs)
        return Outcome(tuple(Applied(n, "scaled", {"factor": self.factor}) for n in names))
