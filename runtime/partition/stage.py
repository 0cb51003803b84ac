"""One stage: its halves as functions, with all runtime parts around, and what is in flight."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from graphopt.partitioning.split import Half as Cut
from graphopt.partitioning.split import Kind, Port
from graphopt.plan import Phase, Plan, Role, Slot
from graphopt.runtime.engine.build import stack
from graphopt.runtime.engine.halves import sized_by_data
from graphopt.runtime.engine.plain import PlainBackward, PlainForward
from graphopt.runtime.engine.step import Backward, Compile, Half, Step
from graphopt.runtime.partition.adding import SUM, adding
from graphopt.runtime.partition.update import Gathered
from graphopt.runtime.session import Session

# Under which a step keeps what its backward reads; kinds are told apart, as names may be equal.
_OWN = "partition/{kind}/{name}"

Values = dict[str, Any]


@dataclass(eq=False)
class InFlight:
    """One micro-batch in one stage, between its forward and its backward.

    Attributes:
        step: its forward and backward.
        held: what the backward reads, by kind and name.
        outputs: results of the step that the forward gave, by slot.
        sent: what the backward gave to the stage before.
    """

    step: Step
    held: dict[Kind, Values] = field(default_factory=dict)
    outputs: dict[Slot, Any] = field(default_factory=dict)
    sent: Values = field(default_factory=dict)


class Stage:
    """Runs the halves of one stage.

    Args:
        plan: of the step.
        session: of the model.
        compile: makes a function of a graph.
        forward: its forward half.
        backwards: its backward half, whole or in two.

    Attributes:
        receives: what the forward takes from the stage before.
        sends: what it gives to the next one.
    """

    def __init__(
        self,
        plan: Plan,
        session: Session,
        compile: Compile,
        forward: Cut,
        backwards: Sequence[Cut],
    ) -> None:
        self._session = session
        self._inputs = tuple(s for s in plan.signature.inputs if s.role is not Role.TANGENT)
        self._tangents = plan.signature.names(Role.TANGENT)
        positions = {id(s): i for i, s in enumerate(self._inputs)}
        self._index = [positions.get(id(s), -1) for s in plan.signature.inputs]
        self._slots = plan.signature.outputs
        self.forward_ports = forward
        make = stack(plan, session, "forward", partial(PlainForward, compile))
        order = _reordered(forward)
        self._results = tuple(p for p in order.outputs if p.kind is Kind.STEP)
        self._passed = tuple(p for p in order.outputs if p.kind is not Kind.STEP)
        slots = tuple(self._slots[p.position] for p in self._results)
        places = tuple(("input", i) for i in range(len(order.inputs)))
        self._forward = make(Half(order.module, slots, places))
        self._written = self._mutations(self._forward.returns)
        self.backward_ports = tuple(backwards)
        self._make_backward = stack(
            plan, session, "backward", partial(PlainBackward, compile, session, self._inputs)
        )
        self._halves = [self._half(b) for b in backwards]
        self._backwards: list[Backward] = [self._make_backward(h) for h in self._halves]
        self._adding: dict[tuple[int, bool], Backward] = {}
        self._in_place = plan.backend == "eager"
        self._written_late = [self._mutations(b.returns) for b in self._backwards]
        self._read_late = sorted(
            {
                self._index[p.position]
                for b in backwards
                for p in b.inputs
                if p.kind is Kind.STEP and self._index[p.position] >= 0
            }
        )
        self._sized_by_call = any(sized_by_data(b.module) for b in backwards)
        self._backward_finds = [frozenset(_found(b)) for b in backwards]

    def forward(self, flight: InFlight, inputs: Sequence[Tensor], received: Values) -> Values:
        """The forward of one micro-batch; what the next stage gets.

        Args:
            flight: filled with what the backward reads.
            inputs: of the step, without tangents; buffers that the stage changes are written to.
            received: from the stage before, by name.
        """
        arguments = [
            inputs[self._index[p.position]] if p.kind is Kind.STEP else received[p.name]
            for p in self.forward_ports.inputs
        ]
        with torch.no_grad(), torch._C._DisableAutocast():
            results = list(self._forward(flight.step, arguments))
            count = len(self._forward.returns)
            self._write_back(self._written, inputs.__getitem__, results)
        flight.step.inputs = {i: inputs[i] for i in self._read_late}
        flight.outputs = dict(zip(self._forward.returns, results[:count], strict=True))
        outputs = {s.name: v for s, v in flight.outputs.items() if s.role is Role.OUTPUT}
        if self._sized_by_call and outputs.keys() >= set(self._tangents):
            with_tangent = [outputs[name] for name in self._tangents]
            flight.step.geometry = [(v.shape, v.stride()) for v in with_tangent]
        sent: Values = {}
        saved: Values = {}
        for port, value in zip(self._passed, results[count:], strict=True):
            (sent if port.kind is Kind.SENT else saved)[port.name] = value
        flight.held = {Kind.SAVED: saved}
        return sent

    def backward(
        self,
        flight: InFlight,
        tangents: Mapping[str, Tensor | None],
        received: Values,
        part: int = 0,
        sums: Gathered | None = None,
    ) -> tuple[Values, Values, dict[Slot, Any]]:
        """The backward of one micro-batch, or one of its two parts.

        Args:
            flight: what the forward left; the last part takes it.
            tangents: of the outputs of the step by name; used by the last stage.
            received: from the next stage, by name.
            part: of a backward in two.
            sums: of gradients of earlier micro-batches, to which these are added: they are among
                the results then.

        Returns:
            What the stage before gets; shares of gradients that several stages add up; and results
            of the step by slot.
        """
        step, half = flight.step, self._backwards[part]
        if sums is not None:
            half = self._summing(part, sums)
            step.own.update({SUM.format(name=n): value for n, value in sums.values.items()})
        flight.held.setdefault(Kind.RECEIVED, {}).update(received)
        for kind, name in self._backward_finds[part]:
            step.own[_OWN.format(kind=kind, name=name)] = flight.held[kind][name]
        given = [tangents.get(name) for name in self._tangents]
        with torch.no_grad(), torch._C._DisableAutocast():
            results = half(step, given, ())
            at = self._late(step)
            self._write_back(self._written_late[part], at, results)
        found: dict[Kind, Values] = {kind: {} for kind in Kind}
        of_step: dict[Slot, Any] = {}
        for slot, value in zip(half.returns, results, strict=True):
            kind, name = _kind_of(slot)
            if kind is Kind.STEP:
                of_step[slot] = value
            else:
                found[kind][name] = value
        flight.held[Kind.KEPT] = found[Kind.KEPT]
        if part == len(self._backwards) - 1:
            flight.held, step.inputs = {}, {}
        return found[Kind.SENT], found[Kind.PARTIAL], of_step

    def _summing(self, part: int, sums: Gathered) -> Backward:
        """The backward that adds gradients to others, in their memory where that is nobody's."""
        key = part, self._in_place and sums.owned
        if key not in self._adding:
            half = adding(self._halves[part], sums.values.keys(), in_place=key[1])
            self._adding[key] = self._make_backward(half)
        return self._adding[key]

    def _late(self, step: Step) -> Callable[[int], Tensor]:
        def at(index: int) -> Tensor:
            slot = self._inputs[index]
            if slot.role is Role.STATE:
                return self._session.states.tensor(slot.name)
            return step.inputs[index]

        return at

    def _half(self, cut: Cut) -> Half:
        slots = tuple(
            self._slots[p.position]
            if p.kind is Kind.STEP
            else Slot(Role.AUX, _OWN.format(kind=p.kind, name=p.name), Phase.BACKWARD)
            for p in cut.outputs
        )
        return Half(cut.module, slots, tuple(self._source(p) for p in cut.inputs))

    def _source(self, port: Port) -> tuple[str, Any]:
        if port.kind is not Kind.STEP:
            return "own", _OWN.format(kind=port.kind, name=port.name)
        index = self._index[port.position]
        if index >= 0:
            return "input", index
        before = self._index[: port.position]
        return "tangent", sum(i < 0 for i in before)

    def _mutations(self, returns: Iterable[Slot]) -> tuple[tuple[int, int], ...]:
        places = {s.name: i for i, s in enumerate(self._inputs)}
        found = ((i, s) for i, s in enumerate(returns) if s.role is Role.MUTATION)
        return tuple((i, places[s.name]) for i, s in found)

    @staticmethod
    def _write_back(
        mutations: Sequence[tuple[int, int]],
        at: Callable[[int], Tensor],
        results: Sequence[Any],
    ) -> None:
        if mutations:
            torch._foreach_copy_([at(p) for _, p in mutations], [results[i] for i, _ in mutations])


def _kind_of(slot: Slot) -> tuple[Kind, str]:
    """What an AUX result of this method is."""
    owner, _, rest = slot.name.partition("/")
    if slot.role is not Role.AUX or owner != "partition":
        return Kind.STEP, slot.name
    kind, _, name = rest.partition("/")
    return Kind(kind), name


def _found(cut: Cut) -> list[tuple[Kind, str]]:
    return [(p.kind, p.name) for p in cut.inputs if p.kind is not Kind.STEP]


def _reordered(cut: Cut) -> Cut:
    """With the results of the step in front, as a forward half has them."""
    order = sorted(range(len(cut.outputs)), key=lambda i: cut.outputs[i].kind is not Kind.STEP)
    output = cut.module.graph.output_node()
    returned = output.args[0]
    assert isinstance(returned, tuple | list)
    output.args = (tuple(returned[i] for i in order),)
    cut.module.recompile()
    return Cut(cut.module, cut.inputs, tuple(cut.outputs[i] for i in order))
