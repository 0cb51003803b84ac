"""The rows that a use of a weight consists of, and their moments.

Rows are output gradients and inputs of a layer, one pair for every example and position. Only those
of a matrix product lie in memory as such; the operators of `graphopt.ops.moments` take convolutions
and embeddings as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, cast

import torch
from torch import fx

import graphopt.ops.low_rank
import graphopt.ops.moments
import graphopt.ops.packed_diagonal  # noqa: F401  (all define operators)
from graphopt.analysis.weight_uses import Use, depends_on_tangents
from graphopt.graph import Graph, value_of
from graphopt.passes.kfac.rnn import rnn_rows
from graphopt.plan.kfac import DENSE, LOW_RANK, Side
from graphopt.rewrite import emit
from graphopt.size_nodes import Scale, Size, Sizes, as_float, at_hint, same, value

aten = torch.ops.aten
moments = torch.ops.graphopt

Moment = Callable[[Side, bool, Scale], fx.Node]


@dataclass(frozen=True)
class Rows:
    """Both operands of one use, as makers of moments.

    Attributes:
        gradient: moment of the rows of output gradients.
        input: moment of the rows of inputs.
        by_example: rows of gradients and inputs per example ``[n, R, d]``, where they can be told.
    """

    gradient: Moment
    input: Moment
    by_example: Callable[[], list[fx.Node]] | None = None


def rows_of(graph: Graph, use: Use, n: Size, sizes: Sizes) -> Rows:
    """Insert what one use's moments are made from, for a batch of n examples."""
    if use.kind == "convolution":
        return _convolution(graph, use, sizes)
    if use.kind == "embedding":
        return _embedding(graph, use)
    if use.kind == "rnn":
        return _plain(graph, *rnn_rows(graph, use), None, n)
    p, q = (cast("fx.Node", a) for a in use.node.args[:2])
    left = _as_rows(graph, emit(graph, aten.transpose.int, p, -2, -1, like=use.node), use)
    right = _as_rows(graph, q, use)
    on_left = p in graph.get(depends_on_tangents)
    gradient, x = (left, right) if on_left else (right, left)
    return _plain(graph, gradient, x, examples_first(use, n), n)


def examples_first(use: Use, size: Size) -> bool | None:
    """Whether rows are those of one example after the other, or of one position after the other.

    ``None`` where neither can be told from the shape that was flattened into rows.
    """
    if use.kind != "matmul" or not (use.summed or value_of(use.node).dim() == 2):
        return None
    node, n = cast("fx.Node", use.node.args[1]), value(size)
    count = value_of(node).shape[-2] * (value_of(node).shape[0] if use.summed else 1)
    while node.target in (aten.clone.default, aten._to_copy.default, aten.detach.default):
        node = node.all_input_nodes[0]
    shape = value_of(node).shape
    if node.target in (aten.view.default, aten._unsafe_view.default, aten.reshape.default):
        shape = value_of(node.all_input_nodes[0]).shape
    leading = list(shape)
    while leading and prod(map(at_hint, leading)) > at_hint(count):
        leading.pop()  # what was flattened into one row
    if same(count, n):
        return True
    are = [same(size, n) for size in leading]
    if not same(count % n, 0) or len(are) < 2 or sum(are) != 1:
        return None
    return are[0] if are[0] or are[-1] else None


def _plain(graph: Graph, gradient: fx.Node, x: fx.Node, first: bool | None, n: Size) -> Rows:
    """Rows ``[groups, N, d]`` that exist in memory."""

    def by_example() -> list[fx.Node]:
        return [_per_example(graph, rows, n, first=bool(first)) for rows in (gradient, x)]

    return Rows(
        lambda side, ones, scale: _moment(graph, gradient, side, ones, scale),
        lambda side, ones, scale: _moment(graph, x, side, ones, scale),
        by_example=None if first is None else by_example,
    )


def _as_rows(graph: Graph, node: fx.Node, use: Use) -> fx.Node:
    """``[groups, N, d]`` from ``[N, d]``, ``[b, N, d]`` or the parts of a sum."""
    if value_of(node).dim() == 2:
        return emit(graph, aten.unsqueeze.default, node, 0, like=use.node)
    if use.summed:
        width = value_of(node).shape[-1]
        return emit(graph, aten.reshape.default, node, [1, -1, width], like=use.node)
    return node


def _moment(graph: Graph, rows: fx.Node, side: Side, ones: bool, scale: Scale) -> fx.Node:
    scale = as_float(scale)
    if side.form == DENSE:
        given = (ones, side.blocks // int(value_of(rows).shape[0]), scale)
        return emit(graph, moments.second_moment.default, rows, *given, like=rows)
    if side.form == LOW_RANK:
        kept = (ones, side.rank, scale)
        return emit(graph, moments.low_rank_moment.default, rows, *kept, like=rows)
    return emit(graph, moments.diagonal_moment.default, rows, ones, scale, like=rows)


def add_up(graph: Graph, parts: Sequence[fx.Node]) -> fx.Node:
    """The sum of nodes of one shape."""
    total = parts[0]
    for part in parts[1:]:
        total = emit(graph, aten.add.Tensor, total, part, like=part)
    return total


def add_up_side(graph: Graph, parts: Sequence[fx.Node], side: Side) -> fx.Node:
    """The sum of moments of one side."""
    if side.form != LOW_RANK or len(parts) == 1:
        return add_up(graph, parts)
    return emit(graph, moments.low_rank_sum.default, list(parts), side.size, like=parts[0])


def _convolution(graph: Graph, use: Use, sizes: Sizes) -> Rows:
    arguments: list[Any] = list(use.node.args)
    gradient, x, weight = arguments[:3]
    stride, padding, dilation, transposed, output_padding, groups = arguments[4:10]
    channels = int(value_of(gradient).shape[1])
    kernel = list(value_of(weight).shape[2:])
    # One number stands for all dimensions.
    stride, padding, dilation, output_padding = (
        list(a) * (len(kernel) if len(a) == 1 else 1)
        for a in (stride, padding, dilation, output_padding)
    )

    def of_gradient(side: Side, ones: bool, scale: Scale) -> fx.Node:
        n, each = sizes.of(gradient, 0), channels // groups
        node = emit(graph, aten.reshape.default, gradient, [n, groups, each, -1], like=use.node)
        node = emit(graph, aten.permute.default, node, [1, 0, 3, 2], like=use.node)
        node = emit(graph, aten.reshape.default, node, [groups, -1, each], like=use.node)
        return _moment(graph, node, side, ones, scale)

    def of_input(side: Side, ones: bool, scale: Scale) -> fx.Node:
        geometry: tuple[Any, ...] = (
            kernel,
            stride,
            padding,
            dilation,
            groups,
            transposed,
            output_padding,
            ones,
        )
        if side.form == DENSE:
            geometry = (*geometry, side.blocks // groups)
            operator = moments.patch_moment.default
        elif side.form == LOW_RANK:
            geometry = (*geometry, side.rank)
            operator = moments.low_rank_patch_moment.default
        else:
            operator = moments.patch_diagonal_moment.default
        return emit(graph, operator, x, *geometry, as_float(scale), like=use.node)

    return Rows(of_gradient, of_input)


def _embedding(graph: Graph, use: Use) -> Rows:
    gradient, indices, size, padding = (cast("Any", a) for a in use.node.args[:4])

    def of_gradient(side: Side, ones: bool, scale: Scale) -> fx.Node:
        width = value_of(gradient).shape[-1]
        rows = emit(graph, aten.reshape.default, gradient, [1, -1, width], like=use.node)
        if padding >= 0:
            seen = emit(graph, aten.ne.Scalar, indices, padding, like=use.node)
            seen = emit(graph, aten.reshape.default, seen, [1, -1, 1], like=use.node)
            rows = emit(graph, aten.mul.Tensor, rows, seen, like=use.node)
        return _moment(graph, rows, side, ones, scale)

    def of_input(side: Side, ones: bool, scale: Scale) -> fx.Node:
        given = (indices, size, padding, 1.0)
        counts = emit(graph, moments.token_counts.default, *given, like=use.node)
        # Counts are exact in any type; their scale is not.
        counts = _cast(graph, counts, value_of(gradient))
        counts = emit(graph, aten.mul.Scalar, counts, as_float(scale), like=use.node)
        if side.form == DENSE:
            counts = emit(graph, moments.packed_diagonal.default, counts, like=use.node)
        elif side.form == LOW_RANK:
            kept = (counts, side.rank)
            counts = emit(graph, moments.low_rank_diagonal.default, *kept, like=use.node)
        return counts

    return Rows(of_gradient, of_input)


def _cast(graph: Graph, node: fx.Node, like: torch.Tensor) -> fx.Node:
    wide = torch.float64 if like.dtype is torch.float64 else torch.float32
    if value_of(node).dtype is wide:
        return node
    return emit(graph, aten._to_copy.default, node, dtype=wide, like=node)


# -- one row per example ---------------------------------------------------------------------------


def _per_example(graph: Graph, rows: fx.Node, n: Size, *, first: bool) -> fx.Node:
    """Rows ``[n, R, d]``."""
    width = value_of(rows).shape[-1]
    if first:
        return emit(graph, aten.reshape.default, rows, [n, -1, width], like=rows)
    shaped = emit(graph, aten.reshape.default, rows, [-1, n, width], like=rows)
    return emit(graph, aten.transpose.int, shaped, 0, 1, like=rows)


def with_ones(graph: Graph, rows: fx.Node) -> fx.Node:
    """Rows with the homogeneous coordinate."""
    return emit(graph, aten.constant_pad_nd.default, rows, [0, 1], 1.0, like=rows)


def reduced(graph: Graph, uses: Sequence[Rows], n: Size, sizes: Sizes) -> Rows:
    """Sums of output gradients and means of inputs over all positions of an example.

    Eschenhagen et al., arXiv 2311.00636: the "reduce" setting.
    """
    found: tuple[list[fx.Node], list[fx.Node]] = ([], [])
    positions: list[Size] = []
    for use in uses:
        assert use.by_example is not None
        both = use.by_example()
        positions.append(sizes.of(both[1], 1))
        for node, into in zip(both, found, strict=True):
            into.append(emit(graph, aten.sum.dim_IntList, node, [1], like=node))
    gradient, x = (add_up(graph, nodes) for nodes in found)
    x = emit(graph, aten.div.Scalar, x, sizes.sum(positions, x), like=x)
    gradient, x = (emit(graph, aten.unsqueeze.default, r, 0, like=r) for r in (gradient, x))
    return _plain(graph, gradient, x, True, n)
