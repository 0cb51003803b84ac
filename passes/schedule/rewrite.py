"""Reordering operators, and splitting those that compute two things at once."""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import fx

from graphopt.graph import KEPT_META, Graph, phase_of
from graphopt.plan import Phase

aten = torch.ops.aten

_HALF = "_weight"  # ends the name of the second half of a convolution
_MASK = 10  # position of `output_mask` in the arguments of `convolution_backward`


def tail(graph: Graph) -> tuple[fx.Node, ...]:
    """All operators from the first one of the backward half on, in order."""
    nodes = [n for n in graph.nodes if n.op in ("call_function", "get_attr")]
    backward = (i for i, n in enumerate(nodes) if phase_of(n) is Phase.BACKWARD)
    return tuple(nodes[next(backward, len(nodes)) :])


def reorder(graph: Graph, order: Sequence[fx.Node]) -> None:
    """Put the operators of `tail` into this order, which has to respect their operands."""
    for node in order:
        graph.output.prepend(node)
    graph.changed()


def arrange(graph: Graph, apart: Iterable[str], order: Iterable[str]) -> dict[fx.Node, fx.Node]:
    """Split the convolutions named by `apart`, then put the operators of `tail` into `order`.

    Returns:
        what `split` does.
    """
    whole = {node.name: node for node in splittable(graph)}
    halves = split(graph, [whole[name] for name in apart])
    named = {node.name: node for node in tail(graph)}
    reorder(graph, [named[name] for name in order])
    return halves


def outline(graph: Graph) -> str:
    """Digest of what `arrange` relies on; an order found for a graph is legal for its equals.

    Operators of `tail` and what they read of each other count, but neither names nor sizes: batches
    may differ between ranks, and sizes be symbols in one of the graphs.
    """
    nodes = tail(graph)
    place = {node: index for index, node in enumerate(nodes)}
    lines = [f"{n.target} {[place[i] for i in n.all_input_nodes if i in place]}" for n in nodes]
    lines += [str(place[node]) for node in splittable(graph)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def renamed(names: Sequence[str], graph: Graph) -> dict[str, str]:
    """What operators of `tail`, and halves that `split` makes, are called in a graph.

    Args:
        names: of the operators of `tail` in another graph with the same outline.
        graph: this one.
    """
    own = {name: node.name for name, node in zip(names, tail(graph), strict=True)}
    return own | {f"{name}{_HALF}": f"{here}{_HALF}" for name, here in own.items()}


def splittable(graph: Graph) -> tuple[fx.Node, ...]:
    """Backward convolutions that compute the gradient of their input and of their weight."""
    return tuple(
        node
        for node in graph.operators
        if node.target is aten.convolution_backward.default
        and _mask(node)[0]
        and _mask(node)[1]
        and phase_of(node) is Phase.BACKWARD
        and all(user.target is operator.getitem for user in node.users)
    )


def split(graph: Graph, nodes: Iterable[fx.Node]) -> dict[fx.Node, fx.Node]:
    """Compute the weight and bias gradients of these convolutions in a separate call.

    Both halves call the kernels that the whole did, so no bit changes; the second half follows the
    first, which keeps its node.

    Returns:
        for each first half the second one.
    """
    halves = {}
    for node in nodes:
        mask = _mask(node)
        first, second = [True, False, False], [False, *mask[1:]]
        with graph.fx.inserting_after(node):
            other = graph.fx.create_node(
                "call_function",
                node.target,
                (*node.args[:_MASK], second),
                name=f"{node.name}{_HALF}",
            )
        other.meta = {key: node.meta[key] for key in KEPT_META if key in node.meta}
        values = node.meta["val"]
        node.args = (*node.args[:_MASK], first)
        node.meta["val"] = _masked(values, first)
        other.meta["val"] = _masked(values, second)
        for user in list(node.users):
            if user.args[1] != 0:
                user.replace_input_with(node, other)
        halves[node] = other
    graph.changed()
    return halves


def _mask(node: fx.Node) -> list[bool]:
    return cast("list[bool]", node.args[_MASK])


def _masked(values: Sequence[object], mask: Sequence[bool]) -> tuple[object, ...]:
    return tuple(v if keep else None for v, keep in zip(values, mask, strict=True))
