"""Sizes of a batch, and numbers made of them: Python's own, or nodes where sizes are symbols.

Only scales and reshapes of rows hold them. The sizes of factors are those of parameters, which are
fixed.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from functools import reduce
from typing import Any, TypeAlias, cast

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from graphopt.analysis.hints import hint
from graphopt.graph import KEPT_META, Graph, value_of
from graphopt.plan import Role
from graphopt.rewrite import emit

Size: TypeAlias = int | fx.Node
"""A whole number; a node where it is known when the graph runs."""

Scale: TypeAlias = float | fx.Node
"""The same of any real number."""


class Sizes:
    """Sizes of tensors of one graph. Nodes are inserted at the insertion point of ``graph.fx``."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._given: dict[Any, fx.Node] = {}
        for node, slot in zip(graph.inputs, graph.signature.inputs, strict=True):
            value = value_of(node)
            if slot.role is Role.SIZE and isinstance(value, torch.SymInt):
                self._given.setdefault(value.node.expr, node)

    def of(self, tensor: fx.Node, dimension: int) -> Size:
        """One size of a tensor; an input of the graph where it is one, so that none is kept."""
        size = value_of(tensor).shape[dimension]
        if not isinstance(size, torch.SymInt):
            return int(size)
        if size.node.expr.is_number:
            return int(size.node.expr)
        found = self._given.get(size.node.expr)
        if found is not None:
            return found
        return emit(self._graph, torch.ops.aten.sym_size.int, tensor, dimension, like=tensor)

    def all_of(self, tensor: fx.Node) -> list[Size]:
        """All sizes of a tensor."""
        return [self.of(tensor, dimension) for dimension in range(value_of(tensor).dim())]

    def product(self, factors: Iterable[Size], like: fx.Node) -> Size:
        """Their product."""
        return self._combined(operator.mul, factors, 1, like)

    def sum(self, terms: Iterable[Size], like: fx.Node) -> Size:
        """Their sum."""
        return self._combined(operator.add, terms, 0, like)

    def quotient(self, over: Size, under: Size, like: fx.Node) -> Scale:
        """One by the other, rounded once."""
        if isinstance(over, fx.Node) or isinstance(under, fx.Node):
            return self._call(operator.truediv, over, under, like)
        return over / under

    def _combined(
        self,
        function: Callable[[Any, Any], Any],
        given: Iterable[Size],
        neutral: int,
        like: fx.Node,
    ) -> Size:
        numbers = list(given)
        nodes = [n for n in numbers if isinstance(n, fx.Node)]
        known = reduce(function, (n for n in numbers if not isinstance(n, fx.Node)), neutral)
        operands: list[Size] = [*nodes, *([known] if known != neutral or not nodes else [])]
        return reduce(lambda a, b: self._call(function, a, b, like), operands)

    def _call(
        self, function: Callable[[Any, Any], Any], one: Size, other: Size, like: fx.Node
    ) -> fx.Node:
        node = self._graph.fx.call_function(function, (one, other))
        node.meta = {key: like.meta[key] for key in KEPT_META if key in like.meta}
        node.meta["val"] = function(value(one), value(other))
        return node


def value(size: Size) -> Any:
    """What a size is while a graph is rewritten: a number, or a symbolic one."""
    return value_of(size) if isinstance(size, fx.Node) else size


def as_float(scale: Scale) -> Scale:
    """A scale as operators take it."""
    return scale if isinstance(scale, fx.Node) else float(scale)


def same(one: Any, other: Any) -> bool:
    """Whether two sizes are equal in all calls."""
    return bool(statically_known_true(one == other))


def at_hint(size: Any) -> int:
    """A size as it was in the captured call."""
    return cast("int", hint(size))
