"""What there is to decide: operators with a time in either format, and casts between them."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.analysis.aliasing import storage
from graphopt.analysis.fakes import unasked
from graphopt.analysis.hints import elements
from graphopt.graph import Graph, value_of
from graphopt.passes.precision.formats import Format
from graphopt.passes.precision.rules import KEPT_ARGUMENTS, KEPT_RESULTS, Kind, kinds, packet_of
from graphopt.plan import Role


@dataclass(frozen=True)
class Unit:
    """An operator that may run in either format.

    Attributes:
        node: the operator.
        kind: how it takes to lower precision.
        values: nodes whose values get the lower format with it: itself, or its ``getitem``.
        read: float32 values that it reads and that would be lowered for it; not those without
            dimensions, whose format decides nothing.
    """

    node: fx.Node
    kind: Kind
    values: tuple[fx.Node, ...]
    read: tuple[fx.Node, ...]

    @property
    def followed(self) -> tuple[fx.Node, ...]:
        """Of an *infer* operator what it reads in the size of its result; not its biases."""
        if self.kind is not Kind.INFER:
            return ()
        sizes = [elements(value_of(value)) or 0 for value in self.read]
        largest = max(sizes)
        return tuple(v for v, size in zip(self.read, sizes, strict=True) if size == largest)


@dataclass(frozen=True)
class Problem:
    """The choice of a format for each operator.

    Attributes:
        units: operators that may be lowered, by node, in graph order.
        fixed: float32 values that stay as they are and are read by a unit.
        readers: of each value the units that read it, where they would have it lowered.
        read_high: values that something reads in float32 in any case: outputs, operators that stay.
        unknown: operators of float32 values for which there is no rule.
        refused: operators with a rule that cannot run in this format, with the reason.
    """

    units: Mapping[fx.Node, Unit]
    fixed: tuple[fx.Node, ...]
    readers: Mapping[fx.Node, tuple[fx.Node, ...]]
    read_high: frozenset[fx.Node]
    unknown: tuple[fx.Node, ...]
    refused: Mapping[fx.Node, str]

    def on(self, twins: Mapping[fx.Node, fx.Node]) -> Problem:
        """The same problem on a copy of the graph, whose nodes are these."""

        def all_of(nodes: Iterable[fx.Node]) -> tuple[fx.Node, ...]:
            return tuple(twins[n] for n in nodes)

        return Problem(
            {
                twins[n]: Unit(twins[n], unit.kind, all_of(unit.values), all_of(unit.read))
                for n, unit in self.units.items()
            },
            all_of(self.fixed),
            {twins[v]: all_of(found) for v, found in self.readers.items()},
            frozenset(all_of(self.read_high)),
            all_of(self.unknown),
            {twins[n]: reason for n, reason in self.refused.items()},
        )

    def values(self) -> list[fx.Node]:
        """All values that a cast may be needed of."""
        return [*self.fixed, *(v for unit in self.units.values() for v in unit.values)]

    def owner(self) -> dict[fx.Node, fx.Node]:
        """Of each value of a unit, the unit's node."""
        return {value: node for node, unit in self.units.items() for value in unit.values}

    def casts(self, low: frozenset[fx.Node]) -> list[tuple[fx.Node, bool]]:
        """The casts that a choice needs, as ``(value, whether to the lower format)``."""
        owner, found = self.owner(), []
        for value in self.values():
            mine = owner.get(value) in low
            wanted = {reader in low for reader in self.readers.get(value, ())}
            wanted |= {False} if value in self.read_high else set()
            if (not mine) in wanted:
                found.append((value, not mine))
        return found


def is_float32(value: object) -> bool:
    """Whether a fake value is one float32 tensor."""
    return isinstance(value, Tensor) and value.dtype is torch.float32


def is_lowered_already(graph: Graph) -> bool:
    """Whether floating-point values of less than 32 bits are in the graph."""
    values = (value_of(node) for node in graph.nodes)
    flat = (v for value in values for v in (value if isinstance(value, tuple | list) else (value,)))
    return any(
        isinstance(v, Tensor) and v.is_floating_point() and v.element_size() < 4 for v in flat
    )


def find_problem(graph: Graph, format: Format, kept: frozenset[fx.Node]) -> Problem:
    """All operators with float32 operands and results, and what ties them together.

    Args:
        graph: in float32.
        format: the lower one.
        kept: operators that the user keeps in float32.
    """
    kind_of, views = kinds(graph, format), graph.get(storage).views
    islands = leading_aside(graph)
    units: dict[fx.Node, Unit] = {}
    unknown, refused = [], {}
    for node in graph.operators:
        if node.target is operator.getitem or not computes_float32(node):
            continue
        kind = kind_of[node]
        if kind is None:
            unknown.append(node)
        elif kind is not Kind.DENY and node not in kept and node not in islands:
            reason = _reason_against(node, format, node in views)
            if reason:
                refused[node] = reason
            else:
                units[node] = Unit(node, kind, _lowered(node, format), _read(node))
    readers: dict[fx.Node, list[fx.Node]] = {}
    for node, unit in units.items():
        for value in dict.fromkeys(unit.read):
            readers.setdefault(value, []).append(node)
    owned = {value for unit in units.values() for value in unit.values}
    return Problem(
        units=units,
        fixed=tuple(value for value in readers if value not in owned),
        readers={value: tuple(found) for value, found in readers.items()},
        read_high=frozenset(v for v in owned | readers.keys() if _is_read_high(v, units)),
        unknown=tuple(unknown),
        refused=refused,
    )


def lowered_call(node: fx.Node, dtype: torch.dtype) -> Any:
    """The fake result of an operator whose float32 operands have `dtype`, to read dtypes off."""
    read = set(_read(node))

    def operand(argument: fx.Node) -> Any:
        value = value_of(argument)
        return value.to(dtype) if argument in read else value

    kept = KEPT_ARGUMENTS.get(packet_of(node), frozenset())
    args = [
        fx.map_arg(a, value_of if index in kept else operand) for index, a in enumerate(node.args)
    ]
    with torch.no_grad(), unasked(map(value_of, node.all_input_nodes)):
        return node.target(*args, **fx.map_arg(node.kwargs, operand))  # type: ignore[operator]


def _kept(node: fx.Node) -> list[fx.Node]:
    kept = KEPT_ARGUMENTS.get(packet_of(node), frozenset())
    return [a for i, a in enumerate(node.args) if i in kept and isinstance(a, fx.Node)]


def _read(node: fx.Node) -> tuple[fx.Node, ...]:
    kept = KEPT_ARGUMENTS.get(packet_of(node), frozenset())
    found: list[fx.Node] = []
    for index, argument in enumerate((*node.args, *node.kwargs.values())):
        if index not in kept:
            fx.map_arg(argument, found.append)
    return tuple(n for n in found if is_float32(value_of(n)) and value_of(n).dim() > 0)


def leading_aside(graph: Graph) -> set[fx.Node]:
    """Operators that lead to values for the runtime only, as statistics do: they stay exact."""
    aside = {Role.AUX, Role.MUTATION}
    slots = zip(graph.signature.outputs, graph.outputs, strict=True)
    queue = [node for slot, node in slots if slot.role not in aside]
    needed = set(queue)
    while queue:
        for node in queue.pop().all_input_nodes:
            if node not in needed:
                needed.add(node)
                queue.append(node)
    return set(graph.operators) - needed


def computes_float32(node: fx.Node) -> bool:
    """Whether a result of an operator is float32."""
    value = value_of(node)
    return any(map(is_float32, value if isinstance(value, tuple | list) else (value,)))


def _reason_against(node: fx.Node, format: Format, view: bool) -> str:
    if not _read(node):
        return "it reads no float32 value"
    if any(isinstance(a, torch.dtype) for a in (*node.args, *node.kwargs.values())):
        return "its result has a dtype of its own"
    if not isinstance(node.target, torch._ops.OpOverload) or node.target._schema.is_mutable:
        return "it writes in place"
    if set(_read(node)) & set(_kept(node)):
        return "it reads one value in two formats"
    if view:
        return ""
    try:
        result = lowered_call(node, format.dtype)
    except Exception as error:
        return f"it does not run in {format.name}: {str(error).splitlines()[0]}"
    parts = result if isinstance(result, tuple | list) else (result,)
    if not any(isinstance(part, Tensor) and part.dtype is format.dtype for part in parts):
        return f"its result is not in {format.name}"
    return ""


def _lowered(node: fx.Node, format: Format) -> tuple[fx.Node, ...]:
    """The values of a node that have the lower format where it is lowered."""
    if is_float32(value_of(node)):
        return (node,)
    result = lowered_call(node, format.dtype)
    kept = KEPT_RESULTS.get(packet_of(node), frozenset())
    return tuple(
        user
        for user in node.users
        if user.target is operator.getitem
        and user.args[1] not in kept
        and is_float32(value_of(user))
        and result[user.args[1]].dtype is format.dtype
    )


def _is_read_high(value: fx.Node, units: Mapping[fx.Node, Unit]) -> bool:
    return any(user not in units or value not in units[user].read for user in value.users)
