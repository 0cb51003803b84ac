"""What each node of a graph costs: floating-point operations and bytes of memory traffic.

FLOPs follow the convention of `torch.utils.flop_counter`: matrix products, convolutions and
attention count two per multiply-add, pointwise operators and reductions count none. Bytes are those
that an unfused execution reads and writes, so they bound the traffic of a fused one from above.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx
from torch.utils.flop_counter import flop_registry

from graphopt.analysis.aliasing import storage
from graphopt.analysis.hints import at_hint, hint
from graphopt.graph import Graph, operator_name, value_of

aten = torch.ops.aten

Call = tuple[tuple[Any, ...], Mapping[str, Any]]  # positional and keyword arguments

# Attention on the CPU has the same arithmetic as on the GPU, but no formula of its own.
_SAME_FORMULA = {
    aten._scaled_dot_product_flash_attention_for_cpu: aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        aten._scaled_dot_product_flash_attention_backward
    ),
}
_DOT_PRODUCTS = frozenset({aten.mv, aten.dot, aten.vdot})
# These read only the rows that they return, not all of their first argument.
_GATHERS = frozenset({aten.embedding, aten.index, aten.index_select, aten.gather})


@dataclass(frozen=True)
class Cost:
    """What running something once takes.

    Attributes:
        flops: floating-point operations.
        read: bytes read from memory.
        written: bytes written to memory.
    """

    flops: int = 0
    read: int = 0
    written: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.read + other.read, self.written + other.written)

    @property
    def bytes(self) -> int:
        """Memory traffic, reads and writes together."""
        return self.read + self.written


@dataclass(frozen=True)
class Costs:
    """The cost of every node of a graph."""

    by_node: Mapping[fx.Node, Cost]

    def of(self, nodes: Iterable[fx.Node]) -> Cost:
        """The sum over some nodes."""
        return sum((self.by_node[node] for node in nodes), Cost())


def cost(graph: Graph) -> Costs:
    """Count every node of `graph`; views, inputs and the output node cost nothing."""
    free = graph.get(storage).views
    return Costs(
        {
            node: Cost() if node in free or node.op != "call_function" else _cost(node)
            for node in graph.nodes
        }
    )


def tensor_bytes(value: object) -> int:
    """Bytes of all distinct elements in a (possibly nested) value; broadcast ones count once.

    A symbolic size counts as in the captured call, one that depends on data as 1.
    """
    if isinstance(value, torch.Tensor):
        sizes = [(hint(n), s) for n, s in zip(value.shape, _strides(value), strict=True)]
        known = (n for n, s in sizes if n is not None and (type(s) is not int or s != 0))
        return math.prod(known) * value.element_size()
    if isinstance(value, tuple | list):
        return sum(tensor_bytes(item) for item in value)
    return 0


def _strides(value: torch.Tensor) -> tuple[int, ...]:
    # Sparse layouts have no strides; their dense size is then the bound.
    return value.stride() if value.layout is torch.strided else (1,) * value.dim()


def call_cost(target: object, operands: Call, read: Sequence[object], value: object) -> Cost:
    """The cost of one call that is no view.

    Args:
        target: the operator.
        operands: positional and keyword arguments, as values.
        read: the distinct ones among them, in order.
        value: what it returns.
    """
    packet = target.overloadpacket if isinstance(target, torch._ops.OpOverload) else target
    written = tensor_bytes(value)
    total = sum(map(tensor_bytes, read))
    if packet in _GATHERS:
        whole = tensor_bytes(read[0])
        total += min(written, whole) - whole
    return Cost(_flops(packet, operands, value), total, written)


def _cost(node: fx.Node) -> Cost:
    sources = node.all_input_nodes
    bodies = [_body(node, s) for s in sources if s.op == "get_attr"]
    inner = [_total(body) for body in bodies if body is not None]
    if inner:
        # Which branch runs is only known at run time: the most expensive one is the bound.
        return max(inner, key=lambda c: (c.flops, c.bytes))
    operands = fx.node.map_arg((node.args, node.kwargs), value_of)
    return call_cost(node.target, operands, [value_of(s) for s in sources], value_of(node))


def _flops(packet: Any, operands: Call, value: object) -> int:
    args, kwargs = at_hint(operands)
    value = at_hint(value)
    if packet in _DOT_PRODUCTS:
        shape: torch.Size = args[0].shape
        return 2 * math.prod(n for n in shape if type(n) is int)
    formula = cast(
        "Callable[..., int] | None", flop_registry.get(_SAME_FORMULA.get(packet, packet))
    )
    if formula is None:
        return 0
    tensors = (v for v in (value, *args, *kwargs.values()) if isinstance(v, torch.Tensor))
    if any(type(n) is not int for v in tensors for n in v.shape):
        return 0  # it depends on data
    return int(formula(*args, **kwargs, out_val=value))


def _body(node: fx.Node, source: fx.Node) -> fx.GraphModule | None:
    owner = node.graph.owning_module
    body = getattr(owner, str(source.target), None)
    return body if isinstance(body, fx.GraphModule) else None


def _total(body: fx.GraphModule) -> Cost:
    operators = (n for n in body.graph.nodes if n.op == "call_function")
    return sum((_cost(n) for n in operators if operator_name(n) != "getitem"), Cost())
