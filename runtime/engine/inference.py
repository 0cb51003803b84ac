"""Run an inference graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from graphopt.plan import Phase, Plan
from graphopt.runtime.engine.base import Engine, Executable


class InferenceEngine(Engine):
    """Runs an inference graph; no autograd."""

    def __init__(
        self, plan: Plan, forward: Executable, state: Mapping[str, Tensor] | None = None
    ) -> None:
        super().__init__(plan, {} if state is None else state)
        self._forward = forward

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Outputs of the model for its flat inputs."""
        values = self._with_state(inputs)
        with torch._C._DisableAutocast(), torch.no_grad():
            results = self._forward(list(values))
        self._write_back(Phase.FORWARD, values, results)
        return self._assemble(values, [results[i] for i, _ in self._outputs])
