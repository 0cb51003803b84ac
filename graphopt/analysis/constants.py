"""What stays the same from step to step: values derived from weights or from nothing at all."""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor, fx

from graphopt.analysis.effects import is_repeatable
from graphopt.analysis.sharing import Sharing
from graphopt.graph import Graph, value_of

FOLDED = "_folded_"
"""Start of the names of attributes that passes add to a module for constants."""

aten = torch.ops.aten

LITERAL = aten.lift_fresh_copy.default
"""The operator that capture puts on the tensor of a literal (``torch.tensor([1.0, 2.0])``)."""


FILLS = frozenset(
    {
        aten.arange.default,
        aten.arange.start,
        aten.arange.start_step,
        aten.eye.default,
        aten.eye.m,
        aten.full.default,
        aten.ones.default,
        aten.scalar_tensor.default,
        aten.zeros.default,
    }
)
"""Operators that make a constant out of nothing."""


def private_attributes(graph: Graph) -> list[fx.Node]:
    """The ``get_attr`` nodes whose tensor only the graph holds, so that it never changes.

    A tensor that is a plain attribute of the model is held by reference, and may change.
    """
    return [
        node
        for node in graph.nodes
        if node.op == "get_attr"
        and (str(node.target).startswith(FOLDED) or all(u.target is LITERAL for u in node.users))
    ]


def derived(
    graph: Graph,
    sources: Collection[fx.Node],
    admits: Callable[[fx.Node], bool] = lambda _: True,
) -> dict[fx.Node, None]:
    """Repeatable operators all of whose operands are `sources` or derived themselves, in order.

    Args:
        graph: where to look; operators without any operand are derived from nothing, and found too.
        sources: nodes to start from; they are not part of the result.
        admits: a further condition on a derived node, asked in graph order.
    """
    closed = set(sources)
    result: dict[fx.Node, None] = {}
    for node in graph.operators:
        if node in closed or not all(n in closed for n in node.all_input_nodes):
            continue
        if is_repeatable(node) and admits(node):
            closed.add(node)
            result[node] = None
    return result


def cone(node: fx.Node, within: Collection[fx.Node]) -> set[fx.Node]:
    """The members of `within` that `node` is computed from, itself included."""
    found = {node}
    pending = [node]
    while pending:
        for operand in pending.pop().all_input_nodes:
            if operand in within and operand not in found:
                found.add(operand)
                pending.append(operand)
    return found


def is_cheap(node: fx.Node, sharing: Sharing) -> bool:
    """Whether a constant is too cheap to be worth keeping: a view, a fill, a tuple of results.

    A code generator makes fills for free inside the kernel that reads them, and eager needs
    microseconds.
    """
    is_view = sharing.owner(node) is not node
    return is_view or node.target in FILLS or not isinstance(value_of(node), Tensor)
