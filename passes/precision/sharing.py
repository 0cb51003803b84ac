"""Fewer casts: one for all views of a value, and none where an operator widens what it reads."""

from __future__ import annotations

from collections.abc import Sequence, Set

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from graphopt.analysis.aliasing import storage
from graphopt.graph import KEPT_META, Graph, phase_of, value_of
from graphopt.ops.numbers import is_number
from graphopt.passes.precision.rules import packet_of
from graphopt.plan import Phase
from graphopt.rewrite import emit, result_of

_CAST = torch.ops.aten._to_copy.default
# Operators that compute in the wider of their operands' types.
_PROMOTING = frozenset({"add", "sub", "mul", "div"})


def share_casts(graph: Graph, casts: Sequence[fx.Node]) -> list[fx.Node]:
    """Let casts of views of one value, to one format, become views of one cast.

    Views that select, as slices do, are left alone: a cast of all for the sake of parts may be
    more work than it saves.

    Args:
        graph: with the casts in it.
        casts: those that were inserted.

    Returns:
        The casts that are left, in order.
    """
    views = graph.get(storage).views
    order = {node: index for index, node in enumerate(graph.fx.nodes)}
    groups: dict[tuple[fx.Node, torch.dtype], list[fx.Node]] = {}
    for cast in sorted(casts, key=order.__getitem__):
        root = _chain(cast.all_input_nodes[0], views)[0]
        groups.setdefault((root, value_of(cast).dtype), []).append(cast)
    kept: list[fx.Node] = []
    for (root, dtype), group in groups.items():
        kept.append(group[0] if len(group) == 1 else _shared(graph, root, dtype, group, views))
    if len(kept) < len(casts):
        graph.changed()
    return kept


def _shared(
    graph: Graph,
    root: fx.Node,
    dtype: torch.dtype,
    group: Sequence[fx.Node],
    views: frozenset[fx.Node],
) -> fx.Node:
    """One cast of the root, and in place of the others what was between it and them."""
    first = group[0]
    whole = first
    if first.all_input_nodes[0] is not root:
        with graph.fx.inserting_before(first):
            whole = emit(graph, _CAST, root, dtype=dtype, like=root)
        _in_half_of(whole, first)
    made: dict[fx.Node, fx.Node] = {root: whole}
    for cast in (c for c in group if c is not whole):
        _, *steps = _chain(cast.all_input_nodes[0], views)
        node = whole
        for step in steps:
            # A view of the forward must not come to lie in the backward, nor behind its reader.
            if step in made and phase_of(made[step]) is phase_of(cast):
                node = made[step]
                continue
            with graph.fx.inserting_before(cast):
                node = emit(graph, step.target, node, *step.args[1:], like=step, **step.kwargs)  # type: ignore[arg-type]
            _in_half_of(node, cast)
            made[step] = node
        cast.replace_all_uses_with(node)
        _erase(graph, cast, views)
    return whole


def _chain(value: fx.Node, views: frozenset[fx.Node]) -> list[fx.Node]:
    """A value with all views that lead to it from one that is none, of as many elements."""
    chain = [value]
    while value in views and _keeps_all(value):
        value = value.all_input_nodes[0]
        chain.append(value)
    return chain[::-1]


def _keeps_all(view: fx.Node) -> bool:
    tensors = [n for n in view.all_input_nodes if not is_number(value_of(n))]
    if not isinstance(view.target, torch._ops.OpOverload) or len(tensors) != 1:
        return False
    here, before = value_of(view), value_of(view.all_input_nodes[0])
    if not (isinstance(here, Tensor) and isinstance(before, Tensor)):
        return False
    # Sizes that are equal by chance in the captured call do not count.
    same = statically_known_true(here.numel() == before.numel())
    return same and here.dtype is before.dtype


def _in_half_of(node: fx.Node, other: fx.Node) -> None:
    for key in KEPT_META:
        if key not in ("val", "partitioner_tag") and key in other.meta:
            node.meta.setdefault(key, other.meta[key])
    if phase_of(other) is Phase.BACKWARD:
        node.meta["partitioner_tag"] = other.meta["partitioner_tag"]
    else:
        node.meta.pop("partitioner_tag", None)


def _erase(graph: Graph, cast: fx.Node, views: frozenset[fx.Node]) -> None:
    """A cast without readers, and the views that only it has read."""
    node = cast
    while not node.users and (node is cast or (node in views and _keeps_all(node))):
        before = node.all_input_nodes[0]
        graph.fx.erase_node(node)
        node = before


def promote(graph: Graph, casts: Sequence[fx.Node]) -> list[fx.Node]:
    """Leave casts to float32 out where the operator widens its operand itself, with the same bits.

    Args:
        graph: with the casts in it.
        casts: all that were inserted.

    Returns:
        The casts that are left.
    """
    kept, seen_as = [], graph.get(storage).views
    for cast in casts:
        (value,) = cast.all_input_nodes
        views, readers = _read_through(cast, seen_as)
        widening = value_of(cast).dtype is torch.float32
        if not widening or not all(_promotes(r, {cast, *views}) for r in readers):
            kept.append(cast)
            continue
        cast.replace_all_uses_with(value)
        graph.fx.erase_node(cast)
        for view in views:
            view.meta["val"] = result_of(view)
    if len(kept) < len(casts):
        graph.changed()
    return kept


def _read_through(cast: fx.Node, views: frozenset[fx.Node]) -> tuple[list[fx.Node], list[fx.Node]]:
    """Views of a cast, in order, and what reads it or them."""
    found, readers, queue = [], [], list(cast.users)
    for node in queue:
        if node in views and _keeps_all(node):
            found.append(node)
            queue.extend(node.users)
        else:
            readers.append(node)
    return found, readers


def _promotes(reader: fx.Node, narrow: Set[fx.Node]) -> bool:
    """Whether a reader has a float32 operand with dimensions beside these, so that it widens."""
    if packet_of(reader) not in _PROMOTING:
        return False
    others = [value_of(n) for n in reader.all_input_nodes if n not in narrow]
    return any(v.dtype is torch.float32 and v.dim() > 0 for v in others)
