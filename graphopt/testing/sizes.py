"""Sizes of a graph with symbols: which it holds for, and the graph of fixed sizes that it means."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import sympy  # type: ignore[import-untyped]
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from graphopt.errors import ArgumentError
from graphopt.graph import KEPT_META, Graph, value_of
from graphopt.ops.numbers import is_number
from graphopt.plan import Role, Signature

Sizes: TypeAlias = Mapping[str, int]
"""Sizes of a call by the names of the graph's inputs that they are."""

_OTHER = ((2, 7), (5, 3), (6, 6))


def hints_of(graph: Graph) -> dict[str, int]:
    """The sizes of the captured call; none of a graph without symbols."""
    return {name: int(value.node.hint) for name, value in _inputs(graph).items()}


def other_sizes(graph: Graph) -> list[Sizes]:
    """A few other ones for which the graph holds; of all its symbols in turn, or of fewer."""
    names = list(hints_of(graph))
    found = ({n: row[i % len(row)] for i, n in enumerate(names)} for row in _OTHER)
    return [sizes for sizes in found if names and holds(graph, sizes)]


def holds(graph: Graph, sizes: Sizes) -> bool:
    """Whether all that was asked of symbols, by whomever, is true of these sizes."""
    values = _values(graph, sizes)
    for value in _inputs(graph).values():
        env = value.node.shape_env
        bounds = env.var_to_range.get(value.node._expr)
        within = bounds is None or bool(bounds.lower <= values[value.node._expr] <= bounds.upper)
        if not within or not all(bool(guard.expr.xreplace(values)) for guard in env.guards):
            return False
    return True


def conditions(graph: Graph) -> list[str]:
    """What was asked of symbols, as text."""
    return [str(g.expr) for v in [*_inputs(graph).values()][:1] for g in v.node.shape_env.guards]


class At:
    """Evaluates sizes of one graph.

    Args:
        graph: with or without symbols.
        sizes: of its inputs; those that are left out are as in the captured call.
    """

    def __init__(self, graph: Graph, sizes: Sizes) -> None:
        self._values = _values(graph, hints_of(graph) | dict(sizes))

    def __call__(self, size: Any) -> int:
        """A size as a number.

        Raises:
            ArgumentError: it depends on data.
        """
        if not isinstance(size, torch.SymInt):
            return int(size)
        found = size.node.expr.xreplace(self._values)
        if not found.is_number:
            raise ArgumentError(f"the size {size} depends on data", hint="give it as an input")
        return int(found)

    def shape(self, sizes: Any) -> tuple[int, ...]:
        """Several of them."""
        return tuple(map(self, sizes))


def at_sizes(graph: Graph, sizes: Sizes) -> Graph:
    """The graph that it is for calls of these sizes: without symbols and numbers made of them.

    Args:
        graph: whose nodes are operators and numbers; itself where it has no symbols.
        sizes: of its inputs; those that are left out are as in the captured call.
    """
    if not hints_of(graph):
        return graph
    at, given = At(graph, sizes), hints_of(graph) | dict(sizes)
    mode, made = FakeTensorMode(), fx.Graph()
    slots = iter(graph.signature.inputs)
    known: dict[fx.Node, Any] = {}
    with mode, torch.no_grad():
        for node in graph.nodes:
            if node.op == "placeholder" and (slot := next(slots)).role is Role.SIZE:
                known[node] = given[slot.name]
            elif node.op == "output":
                made.output(fx.map_arg(node.args[0], known.__getitem__))
            else:
                known[node] = _copied(graph, node, known, made, mode, at)
    kept = tuple(slot for slot in graph.signature.inputs if slot.role is not Role.SIZE)
    signature = Signature(kept, graph.signature.outputs)
    module = fx.GraphModule(graph.module, made)
    return Graph(module, signature, graph.level, facts=graph.facts)


def _copied(
    graph: Graph,
    node: fx.Node,
    known: Mapping[fx.Node, Any],
    made: fx.Graph,
    mode: FakeTensorMode,
    at: At,
) -> Any:
    """A node of a graph of fixed sizes; a number where it is one."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
    if node.op == "placeholder":
        fake = value_of(node)
        form = (at.shape(fake.shape), at.shape(fake.stride()))
        value = torch.empty_strided(*form, dtype=fake.dtype, device=fake.device)
        args = ()
    elif node.op == "get_attr":
        value = mode.from_tensor(_attribute(graph, str(node.target)))
    else:
        target: Any = node.target
        values = fx.map_arg((args, kwargs), value_of)
        value = target(*values[0], **values[1])
        if is_number(value):
            return value
    copy = made.create_node(node.op, node.target, args, kwargs, name=node.name)
    copy.meta = {key: node.meta[key] for key in KEPT_META if key in node.meta}
    copy.meta["val"] = value
    return copy


def _attribute(graph: Graph, path: str) -> Tensor:
    value: Any = graph.module
    for name in path.split("."):
        value = getattr(value, name)
    assert isinstance(value, Tensor), f"{path} is no tensor"
    return value


def _inputs(graph: Graph) -> dict[str, torch.SymInt]:
    pairs = zip(graph.inputs, graph.signature.inputs, strict=True)
    found = {slot.name: value_of(node) for node, slot in pairs if slot.role is Role.SIZE}
    return {name: value for name, value in found.items() if isinstance(value, torch.SymInt)}


def _values(graph: Graph, sizes: Sizes) -> dict[Any, Any]:
    """By torch's symbols, as they were made: one that is known since is a number elsewhere."""
    known = {name: sympy.Integer(size) for name, size in sizes.items()}
    return {value.node._expr: known[name] for name, value in _inputs(graph).items()}
