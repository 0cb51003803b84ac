"""Operands of products: what each of them is a transpose of, and where it is quantised.

There is one quantiser per producer, format and axis, whoever reads it: operands are followed
through transposes to what they are transposes of. The forward saves the quantised values for the
backward. Only what the backward has in float32 anyway (parameters, inputs, what another operator
saves) is quantised once in each half, so that nothing is saved twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import fx

from graphopt.analysis.aliasing import storage
from graphopt.graph import Graph, phase_of, value_of
from graphopt.passes.precision.problem import is_float32
from graphopt.passes.precision.recipes import Recipe
from graphopt.passes.precision.rules import packet_of
from graphopt.plan import Phase, Role

# Operands of each product by position, with the axis that is contracted. Convolutions contract
# channels and windows at once, which is no axis of a tensor.
PRODUCTS: Mapping[str, tuple[tuple[int, int | None], ...]] = {
    "mm": ((0, 1), (1, 0)),
    "addmm": ((1, 1), (2, 0)),
    "bmm": ((0, 2), (1, 1)),
    "baddbmm": ((1, 2), (2, 1)),
    "mv": ((0, 1), (1, 0)),
    "convolution": ((0, None), (1, None)),
    "convolution_backward": ((0, None), (1, None), (2, None)),
}


@dataclass(frozen=True)
class Operand:
    """What a product reads, as a transpose of what was computed.

    Attributes:
        product: the product.
        position: of the operand among its arguments.
        steps: the transposes that lead to it, the first one first.
    """

    product: fx.Node
    position: int
    steps: tuple[fx.Node, ...]


@dataclass
class Quantised:
    """One tensor in one kind of its format.

    Attributes:
        base: the float32 tensor.
        arguments: of the operator that quantises, behind the tensor.
        axis: that its scales run along, where they do.
        readers: in graph order.
        values: what stands for it in the graph: elements and scales.
        early: whether the forward makes it for the backward alone.
        wide: whether it is made in the backward of what the forward saves in float32.
    """

    base: fx.Node
    arguments: tuple[object, ...]
    axis: int | None
    readers: list[Operand] = field(default_factory=list)
    values: tuple[fx.Node, fx.Node] | None = None
    early: bool = False
    wide: bool = False


def reason_against(node: fx.Node, recipe: Recipe) -> tuple[str, str]:
    """Why an operator that gains by lower precision cannot run in a format: code and words."""
    operands = PRODUCTS.get(packet_of(node))
    if operands is None:
        return "not-a-product", "its products are inside of it, where nothing can be rounded"
    if recipe.by_axis and any(axis is None for _, axis in operands):
        return "no-axis", "it contracts several axes at once, and scales run along one"
    if not all(is_float32(value_of(node.args[i])) for i, _ in operands):  # type: ignore[arg-type]
        return "cannot-run", "an operand is not float32"
    return "", ""


def find_operands(graph: Graph, recipe: Recipe, products: Iterable[fx.Node]) -> list[Quantised]:
    """What the operands of these products are made of, in the order of the products."""
    gradients = _gradients(graph)
    found: dict[tuple[object, ...], Quantised] = {}
    for product in products:
        for position, axis in PRODUCTS[packet_of(product)]:
            node = product.args[position]
            assert isinstance(node, fx.Node)
            base, axis, steps = _source(node, axis)
            arguments = recipe.kind(base in gradients, axis)
            tensor = Quantised(base, arguments, axis if recipe.reads_axis else None)
            tensor = found.setdefault((phase_of(product), base, *arguments), tensor)
            tensor.readers.append(Operand(product, position, steps))
    return _shared(graph, found)


def _source(node: fx.Node, axis: int | None) -> tuple[fx.Node, int | None, tuple[fx.Node, ...]]:
    """What a node is a transpose of, the same axis there, and the transposes."""
    steps: list[fx.Node] = []
    while (order := _order(node)) is not None:
        axis = None if axis is None else order[axis]
        steps.insert(0, node)
        node = node.all_input_nodes[0]
    return node, axis, tuple(steps)


def _order(node: fx.Node) -> list[int] | None:
    """For each axis of a transpose the axis it was before; ``None`` for other nodes."""
    name = packet_of(node)
    if name not in ("t", "transpose", "permute"):
        return None
    rank = value_of(node).dim()
    order = list(range(rank))
    if name == "permute":
        return [int(d) % rank for d in node.args[1]]  # type: ignore[union-attr,arg-type]
    one, two = (-2, -1) if name == "t" else (int(a) for a in node.args[1:3])  # type: ignore[arg-type]
    if rank > 1:
        order[one], order[two] = order[two], order[one]
    return order


def _gradients(graph: Graph) -> set[fx.Node]:
    """Everything that is computed from a tangent."""
    slots = zip(graph.inputs, graph.signature.inputs, strict=True)
    found = {node for node, slot in slots if slot.role is Role.TANGENT}
    for node in graph.nodes:
        if found.intersection(node.all_input_nodes):
            found.add(node)
    return found


def _shared(graph: Graph, found: dict[tuple[object, ...], Quantised]) -> list[Quantised]:
    """Let the backward read what the forward quantises, where it does not have it in float32."""
    owner = graph.get(storage).owner
    needed = _read_wide(graph, found.values())
    tensors = []
    for (half, *kind), tensor in found.items():
        memory = owner[tensor.base]
        tensors.append(tensor)
        if half is Phase.FORWARD or phase_of(tensor.base) is Phase.BACKWARD:
            continue
        if memory.op != "call_function":
            continue
        if memory in needed or tensor.base.meta.get("recompute"):
            tensor.wide = True
        elif forward := found.get((Phase.FORWARD, *kind)):
            forward.readers += tensor.readers
            tensors.pop()
        else:
            tensor.early = True
    return tensors


def _read_wide(graph: Graph, found: Iterable[Quantised]) -> set[fx.Node]:
    """Memory that the backward reads in float32, other than to quantise it."""
    owner, views = graph.get(storage).owner, graph.get(storage).views
    quantised = {(r.product, r.position) for tensor in found for r in tensor.readers}
    needed = {owner[n] for n in graph.output.all_input_nodes if phase_of(n) is Phase.BACKWARD}
    for node in graph.operators:
        if phase_of(node) is Phase.FORWARD or node in views:
            continue
        parts = [(i, arg) for i, arg in enumerate(node.args) if isinstance(arg, fx.Node)]
        mine = {arg for i, arg in parts if (node, i) in quantised}
        other = {arg for i, arg in parts if (node, i) not in quantised}
        needed |= {owner[n] for n in node.all_input_nodes if n in other or n not in mine}
    return needed
