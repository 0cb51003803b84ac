"""What every engine does around its executables: mutations and outputs that are inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from graphopt.plan import Plan, Role, Slot
from graphopt.runtime.session import Session


class Engine:
    """Knows the inputs and outputs of a plan by position.

    Args:
        plan: what to obey.
        session: holds the tensors of ``STATE`` inputs.
        returns: what the forward gives, in order.

    Attributes:
        data: tells what the backend has made, for a later process; none where nothing is told.
    """

    data: Callable[[], dict[str, Any]] | None = None

    def __init__(self, plan: Plan, session: Session, returns: Sequence[Slot]) -> None:
        self.plan = plan
        self.session = session
        self.slots = tuple(s for s in plan.signature.inputs if s.role is not Role.TANGENT)
        self._position = {slot.name: i for i, slot in enumerate(self.slots)}
        self._state_names = [s.name for s in self.slots if s.role is Role.STATE]
        self._outputs = tuple(
            (i, int(s.name)) for i, s in enumerate(returns) if s.role is Role.OUTPUT
        )
        self._forward_mutations = self._mutations(returns)

    def _with_state(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        return [*inputs, *map(self.session.states.tensor, self._state_names)]

    def _mutations(self, returns: Sequence[Slot]) -> tuple[tuple[int, int], ...]:
        """Positions of mutation results, and of the inputs that they belong to."""
        return tuple(
            (i, self._position[s.name]) for i, s in enumerate(returns) if s.role is Role.MUTATION
        )

    def _write_back(
        self,
        mutations: Sequence[tuple[int, int]],
        input_at: Callable[[int], Tensor],
        results: Sequence[Any],
    ) -> None:
        if mutations:
            with torch.no_grad():
                targets = [input_at(place) for _, place in mutations]
                torch._foreach_copy_(targets, [results[i] for i, _ in mutations])

    def _assemble(self, inputs: Sequence[Tensor], computed: Sequence[Tensor]) -> list[Tensor]:
        """The model's outputs in order: what was computed, and views of inputs."""
        if not self.plan.aliases:
            return list(computed)
        outputs = {position: t for (_, position), t in zip(self._outputs, computed, strict=True)}
        for alias in self.plan.aliases:
            base = inputs[alias.input]
            if alias.is_view:
                size, stride, offset = alias.geometry(inputs)
                base = base.as_strided(size, stride, base.storage_offset() + offset)
            outputs[alias.output] = base.detach() if alias.detached else base
        return [outputs[i] for i in sorted(outputs)]

    def _input_at(self, index: int, inputs: Mapping[int, Tensor]) -> Tensor:
        """An input of the step when its backward runs."""
        slot = self.slots[index]
        return self.session.states.tensor(slot.name) if slot.role is Role.STATE else inputs[index]
