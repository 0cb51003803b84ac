"""Which values of a graph are flex tensors, and which stay float32 and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from graphopt.analysis.aliasing import storage
from graphopt.analysis.effects import writes
from graphopt.analysis.fakes import keeping_symbols
from graphopt.graph import Graph, operator_name, phase_of, value_of
from graphopt.passbase import Declined
from graphopt.passes.flexpoint import rules
from graphopt.plan import Phase, Role

_ASIDE = frozenset({Role.AUX, Role.MUTATION})


@dataclass(frozen=True)
class Values:
    """The flex tensors of a graph.

    Attributes:
        roots: values with an exponent of their own, those of the forward half first; each half in
            graph order.
        forward: how many of them the forward computes.
        root_of: of each flex value, the root whose exponent it has: itself, or that of the value
            whose elements it moves.
        views: nodes that neither compute nor copy.
        declined: the values that stay float32.
    """

    roots: tuple[fx.Node, ...]
    forward: int
    root_of: Mapping[fx.Node, fx.Node]
    views: frozenset[fx.Node]
    declined: tuple[Declined, ...]


def find_values(graph: Graph) -> Values:
    """Every dense float32 tensor of a graph: a flex tensor, or declined with a reason."""
    views = graph.get(storage).views
    finder = _Finder(graph, views)
    declined: list[Declined] = []
    roots: list[fx.Node] = []
    root_of: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        if node.op == "output" or not rules.is_float32(value_of(node)):
            continue
        moved = rules.moved_operand(node, views) if node.op == "call_function" else None
        if moved is not None and rules.is_float32(value_of(moved)):
            if moved in root_of:
                root_of[node] = root_of[moved]
            continue
        reason, detail = finder.reason_against(node)
        if reason:
            declined.append(Declined(node.name, reason, detail))
        else:
            root_of[node] = node
            roots.append(node)
    first = [n for n in roots if finder.phase(n) is Phase.FORWARD]
    second = [n for n in roots if finder.phase(n) is Phase.BACKWARD]
    return Values((*first, *second), len(first), root_of, views, tuple(declined))


def is_lowered_already(graph: Graph) -> bool:
    """Whether floating-point values of less than 32 bits are in the graph."""
    values = (value_of(node) for node in graph.nodes)
    flat = (v for value in values for v in (value if isinstance(value, tuple | list) else (value,)))
    return any(
        isinstance(v, Tensor) and v.is_floating_point() and v.element_size() < 4 for v in flat
    )


class _Finder:
    """What is known of a graph beside its nodes."""

    def __init__(self, graph: Graph, views: frozenset[fx.Node]) -> None:
        self.views = views
        self.needed = _needed(graph)
        self.slots = dict(zip(graph.inputs, graph.signature.inputs, strict=True))
        self.mutated = set(graph.signature.names(Role.MUTATION))
        self.masks = rules.masks_of(graph.nodes, views)
        self.device = _device(graph)
        self.output = graph.output

    def reason_against(self, node: fx.Node) -> tuple[str, str]:
        """Why a value that no flex value is moved into stays float32; empty where nothing does."""
        value: Tensor = value_of(node)
        slot = self.slots.get(node)
        name = operator_name(node) if slot is None else str(slot)
        if slot is not None and (slot.role is Role.STATE or slot.name in self.mutated):
            return "state", f"{name} is renewed in place"
        if node not in self.needed:
            return "aside", f"{name} leads to statistics and buffers only"
        if not _is_dense(value):
            return "not-dense", "a rounded copy would have another geometry"
        if value.device != self.device:
            return "other-device", f"it is on {value.device}, and the exponents on {self.device}"
        if slot is None:
            for reason, detail in self._of_operator(node, name):
                return reason, detail
        if all(user is not self.output and rules.reads_float(user, node) for user in node.users):
            return (
                "float-operand",
                f"what reads {name} needs all bits of a probability or statistic",
            )
        return "", ""

    def _of_operator(self, node: fx.Node, name: str) -> list[tuple[str, str]]:
        found = []
        if rules.is_constant(node):
            found.append(("constant", f"{name} is written in the program"))
        elif node in self.masks:
            found.append(("mask", f"{name} holds numbers that stand for infinity"))
        elif rules.is_drawn(node):
            found.append(("drawn", f"{name} draws random numbers"))
        elif not rules.is_result(node):
            found.append(("statistic", "it is what its operator gives beside its result"))
        elif rules.is_inside_loss(node):
            found.append(("inside-loss", "gradients of probabilities have no range of their own"))
        elif node.op == "call_function" and writes(node):
            found.append(("in-place", f"{name} writes in place"))
        elif rules.is_inside_softmax(node, self.views):
            found.append(("inside-softmax", f"{name} may be masked, and a softmax reads it alone"))
        return found

    def phase(self, node: fx.Node) -> Phase:
        """The half that first needs a value."""
        if node not in self.slots:
            return phase_of(node)
        if self.slots[node].role is Role.TANGENT:
            return Phase.BACKWARD
        phases = {phase_of(user) for user in node.users if user is not self.output}
        return Phase.BACKWARD if phases == {Phase.BACKWARD} else Phase.FORWARD


def _needed(graph: Graph) -> set[fx.Node]:
    """What leads to outputs of the model and to gradients."""
    slots = zip(graph.signature.outputs, graph.outputs, strict=True)
    queue = [node for slot, node in slots if slot.role not in _ASIDE]
    needed = set(queue)
    while queue:
        for node in queue.pop().all_input_nodes:
            if node not in needed:
                needed.add(node)
                queue.append(node)
    return needed


def _is_dense(value: Tensor) -> bool:
    """Whether a new tensor like it has its strides."""
    with keeping_symbols([value]):
        strides = torch.empty_like(value).stride()
    # Sizes that are equal by chance in the captured call do not count.
    return all(statically_known_true(a == b) for a, b in zip(strides, value.stride(), strict=True))


def _device(graph: Graph) -> torch.device:
    """Where most float32 tensors are."""
    devices = Counter(
        value_of(node).device for node in graph.nodes if rules.is_float32(value_of(node))
    )
    return devices.most_common(1)[0][0] if devices else torch.device("cpu")
