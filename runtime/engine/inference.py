"""Run an inference graph."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from graphopt.plan import Plan
from graphopt.runtime.engine.base import Engine
from graphopt.runtime.engine.step import Forward, Step
from graphopt.runtime.session import Session


class InferenceEngine(Engine):
    """Runs an inference graph; no autograd.

    Args:
        plan: what to obey.
        session: of the model.
        forward: what runs the graph.
    """

    def __init__(self, plan: Plan, session: Session, forward: Forward) -> None:
        super().__init__(plan, session, forward.returns)
        self._forward = forward

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Outputs of the model for its flat inputs."""
        values = self._with_state(inputs)
        with torch._C._DisableAutocast(), torch.no_grad():
            results = self._forward(Step(ends=False), list(values))
        self._write_back(self._forward_mutations, values.__getitem__, results)
        return self._assemble(values, [results[i] for i, _ in self._outputs])
