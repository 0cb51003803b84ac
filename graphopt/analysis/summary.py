"""One line of figures per module, as plain data: what `graphopt show` prints."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import fx

from graphopt.analysis.cost import cost
from graphopt.analysis.liveness import liveness
from graphopt.analysis.regions import Region, regions
from graphopt.graph import Graph, operator_name, phase_of, value_of
from graphopt.plan import Phase, Role
from graphopt.text.names import word_of


@dataclass(frozen=True)
class Totals:
    """Figures of the forward or the backward half of a module.

    Attributes:
        ops: operators, without ``getitem``.
        flops: floating-point operations.
        bytes: bytes read and written.
    """

    ops: int = 0
    flops: int = 0
    bytes: int = 0


@dataclass(frozen=True)
class Summary:
    """Figures of one module, submodules included.

    Attributes:
        path: qualified name, ``""`` for the whole model.
        kind: class name, where known.
        output: type of the last forward value that leaves the module (``"f32[8,10]"``).
        parameters: elements of all parameters that the graph reads.
        forward: figures of the forward half.
        backward: figures of the backward half; zeros in an inference graph.
        saved: bytes of activations kept for backward.
        children: submodules, in the order in which they first run.
    """

    path: str
    kind: str
    output: str
    parameters: int
    forward: Totals
    backward: Totals
    saved: int
    children: tuple[Summary, ...] = field(default=(), repr=False)

    def walk(self) -> Iterator[Summary]:
        """This module and all below it, parents first."""
        yield self
        for child in self.children:
            yield from child.walk()


def summary(graph: Graph) -> Summary:
    """Figures of every module of `graph`, as a tree."""
    sizes = {
        slot.name: value_of(node).numel()
        for slot, node in zip(graph.signature.inputs, graph.inputs, strict=True)
        if slot.role is Role.PARAM
    }
    return _summarise(graph, graph.get(regions), sizes)


def _summarise(graph: Graph, region: Region, sizes: dict[str, int]) -> Summary:
    inside = [node for part in region.walk() for node in part.nodes]
    saved = graph.get(liveness).saved
    return Summary(
        path=region.path,
        kind=region.kind,
        output=_output(graph, inside),
        parameters=sum(sizes[name] for part in region.walk() for name in part.parameters),
        forward=_half(graph, inside, Phase.FORWARD),
        backward=_half(graph, inside, Phase.BACKWARD),
        saved=sum(saved.get(node, 0) for node in inside),
        children=tuple(_summarise(graph, child, sizes) for child in region.children),
    )


def _half(graph: Graph, nodes: Sequence[fx.Node], phase: Phase) -> Totals:
    half = [node for node in nodes if phase_of(node) is phase]
    total = graph.get(cost).of(half)
    return Totals(sum(operator_name(n) != "getitem" for n in half), total.flops, total.bytes)


def _output(graph: Graph, nodes: Sequence[fx.Node]) -> str:
    """The last forward value that another module or the caller reads."""
    inside = set(nodes)
    slots = zip(graph.signature.outputs, graph.outputs, strict=True)
    returned = {node for slot, node in slots if slot.role is Role.OUTPUT}
    leaving = [
        node
        for node in nodes
        if phase_of(node) is Phase.FORWARD
        and isinstance(value_of(node), torch.Tensor)
        and (node in returned or any(_reads(user, inside) for user in node.users))
    ]
    # Modules come in the order of the tree; the last value is the last in the graph.
    return describe(value_of(max(leaving))) if leaving else ""


def _reads(user: fx.Node, inside: set[fx.Node]) -> bool:
    return user.op == "call_function" and user not in inside and phase_of(user) is Phase.FORWARD


def describe(value: object) -> str:
    """Dtype and shape of a value as in a ``.gopt`` text: ``f32[8,10]``, ``(i64[], i64[])``."""
    if isinstance(value, torch.Tensor):
        return f"{word_of(value.dtype)}[{','.join(map(str, value.shape))}]"
    if isinstance(value, tuple | list):
        return "(" + ", ".join(describe(item) for item in value) + ")"
    return type(value).__name__
