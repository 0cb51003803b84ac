"""Weights that are flex tensors themselves, without a copy in float32 beside them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from graphopt.plan.flexpoint import FlexTensors
from graphopt.runtime.engine.step import Step
from graphopt.runtime.flexpoint.statistics import WEIGHTS

# Weights draw others than the tensors of the graph, whose seed begins with 0.
_SEED = 1


class Weights:
    """Rounds parameters in place, each as soon as a step begins after something has written to it.

    Between such writes nothing is done, so a backward still finds the weights of its forward.
    """

    def __init__(self) -> None:
        self._versions = WeakIdKeyDictionary()

    @torch.no_grad()
    def round(self, part: FlexTensors, step: Step, exponents: Tensor, updates: Tensor) -> None:
        """Make the parameters of a step flex values; their statistics stay in the step.

        Args:
            part: what to obey.
            step: that begins.
            exponents: int32 [n].
            updates: int64 []; how many steps have ended, for stochastic rounding.
        """
        found: dict[int, Tensor] = {}
        drawing = (torch.stack([torch.full_like(updates, _SEED), updates]),)
        for name, row in part.weights.items():
            parameter = step.parameters[name]
            if self._versions.get(parameter) == parameter._version:
                continue
            rounded, found[row] = torch.ops.graphopt.flex_round(
                parameter.detach(),
                exponents[row],
                part.mantissa,
                *((row, *drawing) if part.stochastic else ()),
            )
            # It counts as a write: who has saved the weight for a backward must know.
            parameter.copy_(rounded)
            self._versions[parameter] = parameter._version
        if found:
            step.own[WEIGHTS] = found
