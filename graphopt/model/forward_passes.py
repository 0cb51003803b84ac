"""The passes that rewrite the forward graph, in front of the derivation of the backward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import cast

from torch import Tensor, nn

from graphopt.capture import Capture
from graphopt.capture.forward import Rewriter, Rewritten
from graphopt.graph import Graph
from graphopt.model.verification import Stage, Stages
from graphopt.passbase import PassContext
from graphopt.pipeline import Pipeline
from graphopt.pipeline.pipeline import VerifyLevel
from graphopt.pipeline.step import PassStep
from graphopt.rewrite import parametrized_name


@dataclass
class ForwardPasses:
    """What a capture calls with the forward graph.

    Args:
        pipeline: the whole pipeline; only its first passes work on that level.
        ctx: what passes may know.
        verify: as in `Pipeline.run`.

    Attributes:
        steps: one per pass on the forward graph.
    """

    pipeline: Pipeline
    ctx: PassContext
    verify: VerifyLevel
    steps: tuple[PassStep, ...] = ()
    _stages: Stages = field(default_factory=Stages)

    @property
    def rewriter(self) -> Rewriter | None:
        """Itself, where there are such passes."""
        return self if self.pipeline.on_forward else None

    def __call__(self, graph: Graph) -> Rewritten:
        """Run them; see `graphopt.capture.forward.Rewriter`."""
        self._stages = Stages.of(graph)
        pipeline = replace(self.pipeline, observers=(self._stages,))
        count = len(pipeline.on_forward)
        self.steps = pipeline.run(graph, self.ctx, self.verify)[:count]
        earlier = tuple(stage.graph for stage in self._stages.stages[:-1])
        return Rewritten(earlier, self._initial())

    def _initial(self) -> Mapping[str, Tensor]:
        """First values of the parameters that take the place of others."""
        found: dict[str, Tensor] = {}
        for step in self.steps:
            for name, made_by in step.outcome.parametrized.items():
                weight = self.ctx.parameters[name]
                values = made_by.right_inverse(weight.detach())  # type: ignore[operator]
                for number, value in enumerate(cast("tuple[Tensor, ...]", values)):
                    key = parametrized_name(name, number)
                    found[key] = nn.Parameter(value, weight.requires_grad)
        return found

    def stages(self, captured: Capture) -> Stages:
        """The graphs that are derived from what each of them has left."""
        if len(self._stages.stages) < 2:
            return Stages.of(captured.graph)
        graphs = (*captured.earlier, captured.graph.copy())
        pairs = zip(self._stages.stages, graphs, strict=True)
        return Stages([Stage(stage.pass_, graph, stage.parts) for stage, graph in pairs])
