"""Weights that are flex tensors themselves, without a copy in float32 beside them."""

from __future__ import annotations

from collections.abc import MutableMapping

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from graphopt.plan.flexpoint import FlexTensors
from graphopt.runtime.engine.step import Step
from graphopt.runtime.flexpoint.statistics import WEIGHTS


class Weights:
    """Rounds parameters in place, each as soon as a step begins after something has written to it.

    Between such writes nothing is done, so a backward still finds the weights of its forward.
    """

    def __init__(self) -> None:
        self._versions: MutableMapping[Tensor, int] = WeakIdKeyDictionary()

    @torch.no_grad()
    def round(self, part: FlexTensors, step: Step, exponents: Tensor, seed: Tensor | None) -> None:
        """Make the parameters of a step flex values; their statistics stay in the step.

        Args:
            part: what to obey.
            step: that begins.
            exponents: int32 [n].
            seed: int64 [2], that of the graph, where rounding is stochastic.
        """
        found: dict[int, Tensor] = {}
        for name, row in part.weights.items():
            parameter = step.parameters[name]
            if self._versions.get(parameter) == parameter._version:
                continue
            rounded, found[row] = torch.ops.graphopt.flex_round(
                parameter.detach(),
                exponents[row],
                part.mantissa,
                *((row, seed) if part.stochastic else ()),
            )
            # It counts as a write: who has saved the weight for a backward must know.
            parameter.copy_(rounded)
            self._versions[parameter] = parameter._version
        if found:
            step.own[WEIGHTS] = found
