"""What every engine does around its executable: mutations and outputs that are inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from graphopt.plan import Phase, Plan, Role, Slot

# Takes a list of arguments, empties it, returns the outputs.
Executable = Callable[[list[Any]], Sequence[Any]]


def _returned(slots: Iterable[Slot]) -> list[Slot]:
    """The outputs that executables return: each form of a backward has one gradient per name."""
    return [slot for slot in slots if slot.role not in (Role.LOCAL, Role.STATISTIC)]


class Engine:
    """What every engine does around its executable: mutations and aliased outputs.

    Attributes:
        state: tensors of ``STATE`` inputs by name; owned by the model, updated by mutations.
    """

    def __init__(self, plan: Plan, state: Mapping[str, Tensor]) -> None:
        self.plan = plan
        self.state = state
        self.slots = tuple(s for s in plan.signature.inputs if s.role is not Role.TANGENT)
        self._position = {slot.name: i for i, slot in enumerate(self.slots)}
        self._state_names = [s.name for s in self.slots if s.role is Role.STATE]
        outputs = plan.signature.outputs
        self._mutations = {
            phase: tuple(
                (i, s.name)
                for i, s in enumerate(_returned(o for o in outputs if o.phase is phase))
                if s.role is Role.MUTATION
            )
            for phase in Phase
        }
        forward = [s for s in outputs if s.phase is Phase.FORWARD]
        self._outputs = tuple(
            (i, int(s.name)) for i, s in enumerate(forward) if s.role is Role.OUTPUT
        )

    def _with_state(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        return [*inputs, *(self.state[name] for name in self._state_names)]

    def _write_back(self, phase: Phase, inputs: Sequence[Tensor], results: Sequence[Any]) -> None:
        mutations = self._mutations[phase]
        if mutations:
            with torch.no_grad():
                targets = [inputs[self._position[name]] for _, name in mutations]
                torch._foreach_copy_(targets, [results[i] for i, _ in mutations])

    def _assemble(self, inputs: Sequence[Tensor], computed: Sequence[Tensor]) -> list[Tensor]:
        """The model's outputs in order: what was computed, and views of inputs."""
        if not self.plan.aliases:
            return list(computed)
        outputs = {position: t for (_, position), t in zip(self._outputs, computed, strict=True)}
        for alias in self.plan.aliases:
            base = inputs[alias.input]
            outputs[alias.output] = (
                base
                if alias.offset < 0
                else base.as_strided(alias.size, alias.stride, alias.offset)
            )
        return [outputs[i] for i in sorted(outputs)]
