"""When each gradient is ready, which backward operators it waits for, and which of them may move.

The graph runs in its order on one stream. A gradient is ready when all backward operators up to the
one that returns it have run. Operators that lead to one gradient and to nothing else (the product
with the saved activation, the sum for a bias) are free to move; all others are on the chain that
everything behind them waits for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import fx

from graphopt.analysis.aliasing import storage
from graphopt.analysis.cost import Cost, cost
from graphopt.analysis.effects import Effect, effect_of, writes
from graphopt.graph import Graph, phase_of, value_of
from graphopt.plan import Phase, Role
from graphopt.plan.grouping import Ready

aten = torch.ops.aten


@dataclass(frozen=True)
class Device:
    """What a class of devices sustains; assumptions for the roofline, not measured values.

    Attributes:
        flops: floating-point operations per second in 32 bits and more.
        half_flops: the same in 16 bits and less.
        bandwidth: bytes per second to and from memory.
        overhead: seconds to launch one operator.
    """

    flops: float
    half_flops: float
    bandwidth: float
    overhead: float


# Orders of magnitude for one core with vector units and for a data-centre GPU: good enough for the
# ratios between ready times. A plan that needs more uses a measured profile. Those with a name are
# what is published of them, with the share that training usually reaches: in 32 bits and of memory
# 0.8 to 0.9, of matrix units 0.5 to 0.6.
ASSUMED = {
    "cpu": Device(flops=5e10, half_flops=5e10, bandwidth=1e10, overhead=3e-6),
    "cuda": Device(flops=2e13, half_flops=2e14, bandwidth=1.5e12, overhead=4e-6),
    "v100": Device(flops=1.25e13, half_flops=6.5e13, bandwidth=7.5e11, overhead=5e-6),
    "h100": Device(flops=5.4e13, half_flops=5e14, bandwidth=2.8e12, overhead=4e-6),
}


@dataclass(frozen=True)
class Unit:
    """Operators that lead only to these gradients, and so can run at any later time.

    Attributes:
        nodes: in graph order; the last one returns a gradient.
        names: qualified names of the parameters.
    """

    nodes: tuple[fx.Node, ...]
    names: tuple[str, ...]


@dataclass(frozen=True)
class GradientOrder:
    """The gradients of all parameters in the order in which they are ready.

    Attributes:
        ready: one entry per gradient of a parameter, earliest first.
        backward: seconds of the whole backward half.
        chain: backward operators that cannot be delayed without delaying something else.
        movable: backward operators that lead to one gradient only, in graph order.
        units: the same operators, by gradient.
        times: ``"roofline"`` or ``"measured"``.
        seconds: time of each backward operator.
    """

    ready: tuple[Ready, ...]
    backward: float
    chain: frozenset[fx.Node]
    movable: tuple[fx.Node, ...]
    units: tuple[Unit, ...]
    times: str
    seconds: Mapping[fx.Node, float] = field(repr=False)

    @property
    def sizes(self) -> list[str]:
        """One line per gradient, equal on all ranks that can reduce them together."""
        return sorted(f"{r.name} {r.kind} {r.bytes} bytes" for r in self.ready)

    @property
    def sparse(self) -> list[str]:
        """Parameters whose gradients are sparse: no message of fixed size carries them."""
        return [r.name for r in self.ready if r.kind.startswith("sparse")]


def gradient_order(graph: Graph, device: Device | None = None) -> GradientOrder:
    """The order for a device, by default of the class (`ASSUMED`) that the graph is captured on."""
    seconds = graph.get(roofline) if device is None else roofline(graph, device)
    return _order(graph, seconds, "roofline")


def measured_order(graph: Graph, seconds: Mapping[fx.Node, float]) -> GradientOrder:
    """The order for measured times (`graphopt.analysis.profile.profile_graph`).

    Raises:
        KeyError: a backward operator has no time.
    """
    return _order(graph, seconds, "measured")


def roofline(graph: Graph, device: Device | None = None) -> dict[fx.Node, float]:
    """Estimated seconds of every operator: the slower of arithmetic and memory, plus its launch.

    Views are free. Without `device`, each operator runs on the `ASSUMED` one of the kind that the
    graph was captured on.
    """
    costs, views = graph.get(cost).by_node, graph.get(storage).views
    result = {}
    for node in graph.operators:
        spent = roofline_seconds(costs[node], value_of(node), device)
        result[node] = 0.0 if node in views else spent
    return result


def roofline_seconds(work: Cost, value: object, device: Device | None = None) -> float:
    """Estimated seconds of one operator that returns `value`, its launch included.

    Without `device`, it runs on the `ASSUMED` one of the kind that the value is on.
    """
    kind, wide = _placed(value)
    used = device or ASSUMED.get(kind, ASSUMED["cuda"])
    flops = used.flops if wide else used.half_flops
    return max(work.flops / flops, work.bytes / used.bandwidth) + used.overhead


def _placed(value: object) -> tuple[str, bool]:
    """Device type of a result, and whether its floating-point parts have 32 bits or more."""
    parts = value if isinstance(value, tuple | list) else (value,)
    tensors = [part for part in parts if isinstance(part, torch.Tensor)]
    if not tensors:
        return "cpu", True
    wide = [t.element_size() >= 4 for t in tensors if t.is_floating_point()]
    return tensors[0].device.type, all(wide)


def _order(graph: Graph, seconds: Mapping[fx.Node, float], times: str) -> GradientOrder:
    backward = [n for n in graph.operators if phase_of(n) is Phase.BACKWARD]
    done, clock = {}, 0.0
    for node in backward:
        clock += seconds[node]
        done[node] = clock
    gradients = parameter_gradients(graph)
    position = {node: index for index, node in enumerate(graph.nodes)}
    names = sorted(gradients, key=lambda name: position[gradients[name]])
    units = _units(graph, backward, gradients)
    inside = {node for unit in units for node in unit.nodes}
    return GradientOrder(
        ready=tuple(_ready(name, gradients[name], done) for name in names),
        backward=clock,
        chain=frozenset(backward) - inside,
        movable=tuple(node for node in backward if node in inside),
        units=units,
        times=times,
        seconds={node: seconds[node] for node in backward},
    )


def parameter_gradients(graph: Graph) -> dict[str, fx.Node]:
    """The node of each parameter's gradient; gradients of other inputs are not reduced."""
    parameters = set(graph.signature.names(Role.PARAM))
    return {
        slot.name: node
        for slot, node in zip(graph.signature.outputs, graph.outputs, strict=True)
        if slot.role is Role.GRAD and slot.name in parameters
    }


def _ready(name: str, node: fx.Node, done: Mapping[fx.Node, float]) -> Ready:
    value = value_of(node)
    kind = f"{str(value.dtype).removeprefix('torch.')} {value.device.type}"
    return Ready(
        name=name,
        bytes=value.numel() * value.element_size(),
        # What the forward half or the caller computes is there when backward begins.
        seconds=done.get(node, 0.0),
        kind=kind if value.layout is torch.strided else f"sparse {kind}",
        module=name.rpartition(".")[0],
    )


# -- what may move ---------------------------------------------------------------------------------

# Stands for whatever more than two gradients depend on; keeps the sets small.
_SEVERAL = frozenset({"= several"})


def _units(
    graph: Graph, backward: list[fx.Node], gradients: Mapping[str, fx.Node]
) -> tuple[Unit, ...]:
    goals = _goals(graph, gradients)
    members: dict[frozenset[str], set[fx.Node]] = {}
    for node in backward:
        if len(goals[node]) == 1 and goals[node] <= gradients.keys():
            members.setdefault(goals[node], set()).add(node)
    for node in backward:
        both = goals[node]
        # Weight and bias of one convolution come out of one call, so they move together.
        if len(both) == 2 and both <= gradients.keys() and gives_weights_only(node):
            single = [members.pop(frozenset({name}), set()) for name in both]
            members[both] = {node}.union(*single)
    position = {node: index for index, node in enumerate(backward)}
    units = [
        Unit(
            tuple(sorted(nodes, key=position.__getitem__)),
            tuple(name for name in gradients if name in names),
        )
        for names, nodes in members.items()
    ]
    return tuple(sorted(units, key=lambda unit: position[unit.nodes[0]]))


def gives_weights_only(node: fx.Node) -> bool:
    """Whether this is the backward of a convolution without the gradient of its input."""
    if node.target is not aten.convolution_backward.default:
        return False
    mask = cast("list[bool]", node.args[10])
    return not mask[0]


def _goals(graph: Graph, gradients: Mapping[str, fx.Node]) -> dict[fx.Node, frozenset[str]]:
    """What each node leads to: gradients of parameters by name, anything else by a mark."""
    own: dict[fx.Node, set[str]] = {node: set() for node in graph.nodes}
    for slot, node in zip(graph.signature.outputs, graph.outputs, strict=True):
        is_gradient = slot.role is Role.GRAD and slot.name in gradients
        own[node].add(slot.name if is_gradient else f"= {slot}")
    for node in _fixed(graph):
        own[node].add(f"! {node.name}")
    result: dict[fx.Node, frozenset[str]] = {graph.output: frozenset()}
    for node in reversed(graph.nodes[:-1]):
        found = own[node].union(*(result[user] for user in node.users))
        result[node] = frozenset(found) if len(found) <= 2 else _SEVERAL
    return result


def _fixed(graph: Graph) -> set[fx.Node]:
    """Operators that do more than compute, and those that touch memory one of them writes."""
    owner = graph.get(storage).owner
    fixed = {node for node in graph.operators if effect_of(node) is not Effect.PURE}
    written = {owner[value] for node in fixed if writes(node) for value in node.all_input_nodes}
    return fixed | {
        node
        for node in graph.operators
        if any(owner[value] in written for value in (node, *node.all_input_nodes))
    }
