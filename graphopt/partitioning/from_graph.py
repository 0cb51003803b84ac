"""From a captured step to the problem of cutting it into stages."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor, fx
from torch.utils.checkpoint import CheckpointPolicy

from graphopt.analysis.aliasing import storage
from graphopt.analysis.cost import tensor_bytes
from graphopt.analysis.effects import Effect, effect_of
from graphopt.analysis.gradient_order import Device, roofline
from graphopt.errors import ArgumentError
from graphopt.graph import Graph, Level, module_of, phase_of, value_of
from graphopt.partitioning.forward_side import ForwardSide, Made
from graphopt.partitioning.problem import Link, Operator, Parameter, Problem, Value
from graphopt.partitioning.twins import twins, weight_side
from graphopt.plan import Phase, Role

_RECOMPUTED = frozenset({CheckpointPolicy.MUST_RECOMPUTE, CheckpointPolicy.PREFER_RECOMPUTE})


def from_graph(
    graph: Graph,
    seconds: Mapping[fx.Node, float] | None = None,
    *,
    device: Device | None = None,
    link: Link | None = None,
) -> Problem:
    """Operators, values and parameters of one step.

    An operator is what allocates a tensor in the forward half, with its views and in-place
    operators, and with the backward nodes that differentiate it. The backward of a convolution
    counts half as gradient of its input and half as gradient of its weight.

    Args:
        graph: a joint graph, or an inference graph; captured for one micro-batch.
        seconds: of every operator (`graphopt.analysis.profile.profile_graph`); without, a roofline
            estimate is made for `device`.
        device: for the roofline; by default the assumed one of the kind it was captured on.
        link: what connects the stages.

    Raises:
        ArgumentError: the graph is a forward graph or has no operator, or an operator has no time.
    """
    if graph.level is Level.FORWARD:
        raise ArgumentError(
            "stages are cut from a joint or an inference graph",
            where=f"a {graph.level} graph",
            hint="capture the model with graphopt.capture",
        )
    times = "roofline" if seconds is None else "measured"
    if seconds is None:
        seconds = graph.get(roofline) if device is None else roofline(graph, device)
    return _Reader(graph, seconds).problem(link or Link(), times)


class _Reader:
    def __init__(self, graph: Graph, seconds: Mapping[fx.Node, float]) -> None:
        self.graph, self.seconds = graph, seconds
        self.side = ForwardSide(graph)
        if not self.side.nodes:
            raise ArgumentError("the graph has no operator to cut at", where="graph")
        self.twin = twins(graph, self.side)
        self.together = [set(group) for group in self.side.groups]
        self.saved: dict[fx.Node, set[int]] = {}
        self.trained = set(graph.signature.names(Role.GRAD))
        self._save()
        self._give()
        self.random = self._random()

    def problem(self, link: Link, times: str) -> Problem:
        names = [nodes[0].name for nodes in self.side.nodes]
        values = [made for made in self.side.made.values() if self._matters(made)]
        return Problem(
            operators=tuple(self._operators(names, self.trained)),
            values=(*(self._value(made, names) for made in values), *self._streams(names)),
            parameters=self._parameters(self.trained),
            together=tuple(frozenset(names[i] for i in g) for g in self.together),
            link=link,
            times=times,
        )

    # -- operators ---------------------------------------------------------------------------------

    def _operators(self, names: list[str], trained: set[str]) -> list[Operator]:
        count = len(names)
        forward, inputs, weights = [0.0] * count, [0.0] * count, [0.0] * count
        for node, index in self.side.host.items():
            forward[index] += self._time(node)
            if node.meta.get("recompute") in _RECOMPUTED:
                inputs[index] += self._time(node)
        behind_views = [0] * count
        for owner in self.saved:
            made = self.side.made[owner]
            if made.maker >= 0:  # what is kept through a smaller view keeps all of its memory
                behind_views[made.maker] += tensor_bytes(value_of(owner)) - made.bytes
        only_weights = weight_side(self.graph, self.twin)
        for node, index in self.twin.items():
            share = 1.0 if node in only_weights else _weight_share(node)
            weights[index] += share * self._time(node)
            inputs[index] += (1.0 - share) * self._time(node)
        return [
            Operator(
                name=name,
                forward=forward[index],
                input_grad=inputs[index],
                weight_grad=weights[index],
                parameters=tuple(sorted(self.side.stored[index])),
                saved=behind_views[index],
                module=module_of(self.side.nodes[index][0]),
                layer=bool(self.side.stored[index] & trained),
            )
            for index, name in enumerate(names)
        ]

    def _time(self, node: fx.Node) -> float:
        try:
            return self.seconds[node]
        except KeyError:
            raise ArgumentError(
                f"operator {node.name!r} has no time",
                where="seconds",
                hint="measure with graphopt.analysis.profile.profile_graph",
            ) from None

    def _parameters(self, trained: set[str]) -> tuple[Parameter, ...]:
        used = set().union(*self.side.stored)
        slots = zip(self.graph.signature.inputs, self.graph.inputs, strict=True)
        return tuple(
            Parameter(slot.name, tensor_bytes(value_of(node)), slot.name in trained)
            for slot, node in slots
            if slot.name in used and self.side.stored_name(node)
        )

    # -- values ------------------------------------------------------------------------------------

    def _matters(self, made: Made) -> bool:
        return bool(made.readers) or made.final or made.owner in self.saved

    def _value(self, made: Made, names: list[str]) -> Value:
        savers = self.saved.get(made.owner, set())
        return Value(
            name=made.owner.name,
            maker=names[made.maker] if made.maker >= 0 else "",
            readers=tuple(names[i] for i in sorted(made.readers)),
            bytes=made.bytes,
            gradient=made.bytes if self._has_gradient(made) else 0,
            saved_by=tuple(names[i] for i in sorted(savers)),
            final=made.final,
        )

    def _streams(self, names: list[str]) -> list[Value]:
        """The random stream, which operators read in their order: nothing crosses a cut."""
        return [
            Value(f"random stream behind {names[first]}", names[first], (names[second],), 0)
            for first, second in pairwise(self.random)
        ]

    def _random(self) -> list[int]:
        """Operators that draw random numbers; stages in their order draw as the whole does."""
        draws = [i for n, i in self.side.host.items() if effect_of(n) is Effect.RANDOM]
        ascending: list[int] = []
        for index in draws:
            if ascending and index < ascending[-1]:
                self.together.append({index, ascending[-1]})
            elif not ascending or index > ascending[-1]:
                ascending.append(index)
        return ascending

    def _has_gradient(self, made: Made) -> bool:
        if not _is_real(made.owner):
            return False
        if made.maker < 0:
            slot = self.graph.slot(made.owner)
            return slot.name in self.graph.signature.names(Role.GRAD)
        wanted, given = self.flows
        return made.maker in wanted and (made.final or not given.isdisjoint(made.readers))

    @cached_property
    def flows(self) -> tuple[set[int], set[int]]:
        """Operators that a gradient may pass through: to something before, from something behind.

        Not all have backward nodes of their own: a sum hands on the gradient as it is.
        """
        backward = set(self.twin.values())
        wanted, given = set(backward), set(backward)
        between = [
            (m.maker, m.readers)
            for m in sorted(self.side.made.values(), key=lambda m: m.maker)
            if m.maker >= 0 and _is_real(m.owner)
        ]
        for maker, readers in between:
            if maker in wanted:
                wanted |= readers
        for maker, readers in reversed(between):
            if not given.isdisjoint(readers):
                given.add(maker)
        given |= {m.maker for m in self.side.made.values() if m.final}
        return wanted, given

    def _save(self) -> None:
        """Which operators' backward reads which values, looking through what is recomputed."""
        for node, index in self.twin.items():
            if self.side.stored_name(node):
                continue  # a view of a parameter: whoever reads it makes it again
            wanted = [
                p
                for p in node.all_input_nodes
                if phase_of(p) is Phase.FORWARD or self.side.stored_name(p)
            ]
            seen: set[fx.Node] = set()
            while wanted:
                source = wanted.pop()
                if source in seen:
                    continue
                seen.add(source)
                if source.meta.get("recompute") in _RECOMPUTED:
                    wanted.extend(source.all_input_nodes)
                else:
                    self._keep(source, index)

    def _give(self) -> None:
        """Count what computes a parameter's gradient, or writes a buffer, among its readers."""
        inputs = self.graph.signature.inputs
        stored = {slot.name for slot in inputs if slot.role in (Role.PARAM, Role.BUFFER)}
        places = {**self.side.host, **self.twin}
        for slot, node in zip(self.graph.signature.outputs, self.graph.outputs, strict=True):
            if slot.role in (Role.GRAD, Role.MUTATION) and slot.name in stored:
                for part in self._summed(node) if slot.role is Role.GRAD else [node]:
                    if part in places:
                        self.side.stored[places[part]].add(slot.name)

    def _summed(self, node: fx.Node) -> list[fx.Node]:
        """What a gradient is the sum of: sums, and views of what is added, go where these are."""
        views = self.graph.get(storage).views
        found: list[fx.Node] = []
        wanted = [node]
        while wanted:
            node = wanted.pop()
            through = node in views or node.target is torch.ops.aten.add.Tensor
            (wanted if through else found).extend(node.all_input_nodes if through else [node])
        return found

    def _keep(self, source: fx.Node, index: int) -> None:
        name = self.side.stored_name(source)
        if name in self.trained:  # its backward reads it, and maybe recomputes what does
            self.side.stored[index].add(name)
        made = self.side.value(source)
        if made is None:
            return
        if made.maker > index:  # its backward reads what a later operator makes
            self.together.append({made.maker, index})
            index = made.maker
        elif made.maker != index:
            made.readers.add(index)
        pieces = value_of(made.owner)
        if isinstance(pieces, tuple | list):
            return  # its pieces are values of their own
        self.saved.setdefault(made.owner, set()).add(index)


def _is_real(node: fx.Node) -> bool:
    value = value_of(node)
    return isinstance(value, Tensor) and value.is_floating_point()


def _weight_share(node: fx.Node) -> float:
    """Which share of a backward node is the gradient of a weight."""
    if node.target is torch.ops.aten.convolution_backward.default:
        mask = node.args[10]
        if isinstance(mask, list | tuple) and mask[0] and mask[1]:
            return 0.5
    return 0.0
