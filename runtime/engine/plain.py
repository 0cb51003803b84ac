"""The innermost forward and backward: an executable and where its arguments come from."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor

from graphopt.plan import Role, Slot
from graphopt.runtime.engine.step import Compile, Half, Source, Step
from graphopt.runtime.engine.tangents import Expected
from graphopt.runtime.session import Session


class PlainForward:
    """A forward half that nothing surrounds."""

    def __init__(self, compile: Compile, half: Half) -> None:
        self.returns = half.slots
        self._run = compile(half.module)

    def __call__(self, step: Step, inputs: list[Any]) -> Sequence[Any]:
        """See `Forward`."""
        return self._run(inputs)


class PlainBackward:
    """A backward half that nothing surrounds.

    Args:
        compile: makes its executable.
        session: holds the tensors of ``STATE`` inputs.
        slots: inputs of the step, tangents not counted.
        half: the half.
    """

    def __init__(
        self, compile: Compile, session: Session, slots: Sequence[Slot], half: Half
    ) -> None:
        self.returns = half.slots
        self._session = session
        placeholders = half.module.graph.find_nodes(op="placeholder")
        self._tangents = {
            index: Expected.of(node.meta["val"])
            for (kind, index), node in zip(half.sources, placeholders, strict=True)
            if kind == "tangent"
        }
        self._sources = tuple(_resolved(source, slots) for source in half.sources)
        self._gradients = {s.name: i for i, s in enumerate(half.slots) if s.role is Role.GRAD}
        self._run = compile(half.module)

    def __call__(
        self, step: Step, tangents: Sequence[Tensor | None], absent: Collection[str]
    ) -> list[Any]:
        """See `Backward`."""
        results = list(self._run(self._arguments(step, tangents)))
        for name in absent:
            if name in self._gradients:
                results[self._gradients[name]] = None
        return results

    def _arguments(self, step: Step, tangents: Sequence[Tensor | None]) -> list[Any]:
        arguments: list[Any] = []
        for kind, key in self._sources:
            if kind == "saved":
                arguments.append(step.saved[key])
            elif kind == "tangent":
                expected = self._tangents[key]
                if step.geometry:
                    expected = expected.at(step.geometry[key])
                arguments.append(expected.coerce(tangents[key]))
            elif kind == "input":
                index, name = key
                arguments.append(step.weights.get(name, step.inputs[index]))
            elif kind == "state":
                arguments.append(self._session.states.tensor(key))
            else:
                arguments.append(step.own.pop(key))
        step.saved.clear()
        return arguments


def _resolved(source: Source, slots: Sequence[Slot]) -> Source:
    """A source with the name of the input, too; ``STATE`` inputs are the session's."""
    kind, key = source
    if kind != "input":
        return source
    slot = slots[key]
    return ("state", slot.name) if slot.role is Role.STATE else (kind, (key, slot.name))
