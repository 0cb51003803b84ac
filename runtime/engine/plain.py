"""The innermost forward and backward: an executable and where its arguments come from."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from operator import itemgetter
from typing import Any

from torch import Tensor

from graphopt.plan import Role, Slot
from graphopt.runtime.engine.step import Compile, Half, Source, Step
from graphopt.runtime.engine.tangents import Taken
from graphopt.runtime.engine.written import Before
from graphopt.runtime.session import Session


class PlainForward:
    """A forward half that nothing surrounds."""

    def __init__(self, compile: Compile, half: Half) -> None:
        self.returns = half.slots
        self._written = half.written
        self._run = compile(half.module)

    def __call__(self, step: Step, inputs: list[Any]) -> Sequence[Any]:
        """See `Forward`."""
        if self._written:
            step.before = Before([inputs[i] for i in self._written])
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
        self._tangents = half.tangents
        self._may_lack = half.may_lack
        sources = [_resolved(source, slots) for source in half.sources]
        self._saved, self._own, self._states = (
            [key for kind, key in sources if kind == wanted] for wanted in ("saved", "own", "state")
        )
        self._inputs = [key for kind, key in sources if kind == "input"]
        # Arguments are gathered kind by kind: one look at a time is felt in a small step.
        kinds = ("saved", "input", "tangent", "state", "own")
        gathered = sorted(range(len(sources)), key=lambda i: kinds.index(sources[i][0]))
        self._take_saved = _taking(self._saved)
        self._take_inputs = _taking([index for index, _ in self._inputs])
        self._in_order = _taking([gathered.index(i) for i in range(len(sources))])
        self._tangent_order = [key for kind, key in sources if kind == "tangent"]
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
        inputs: Sequence[Any] = self._take_inputs(step.inputs)
        if step.weights:
            named = zip(self._inputs, inputs, strict=True)
            inputs = [step.weights.get(name, value) for (_, name), value in named]
        gathered = (
            *self._take_saved(step.saved),
            *inputs,
            *(self._tangent(step, key, tangents[key]) for key in self._tangent_order),
            *map(self._session.states.tensor, self._states),
            *map(step.own.pop, self._own),
        )
        step.saved.clear()
        if isinstance(tangents, Taken):
            tangents.clear()
        return list(self._in_order(gathered))

    def _tangent(self, step: Step, key: int, tangent: Tensor | None) -> Tensor | None:
        if key in self._may_lack:  # a sum takes any strides
            return tangent
        expected = self._tangents[key]
        if step.geometry:
            expected = expected.at(step.geometry[key])
        return expected.coerce(tangent)


def _taking(keys: Sequence[Any]) -> Callable[[Any], Sequence[Any]]:
    """What takes the items of these keys from a list or a dict."""
    if len(keys) > 1:
        return itemgetter(*keys)
    return lambda values: [values[key] for key in keys]


def _resolved(source: Source, slots: Sequence[Slot]) -> Source:
    """A source with the name of the input, too; ``STATE`` inputs are the session's."""
    kind, key = source
    if kind != "input":
        return source
    slot = slots[key]
    return ("state", slot.name) if slot.role is Role.STATE else (kind, (key, slot.name))
