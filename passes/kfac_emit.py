"""Put the statistics of the curvature into the backward graph, next to the weight gradients.

Scales follow SP-NGD (Osawa et al., arXiv 2002.06015) with n examples, T positions of a
convolution and R shared positions of any other weight: for ``A`` 1/n over a convolution's patches
and 1/(nR) otherwise, for ``G`` 1/(nT) and 1/n, where output gradients are those of one example's
loss, so the 1/n of a mean over examples is undone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod
from operator import getitem
from typing import Any, cast

import torch
from torch import fx

import graphopt.ops.moments
import graphopt.ops.packed_diagonal  # noqa: F401  (both define operators)
from graphopt.analysis.weight_uses import Use, depends_on_tangents
from graphopt.curvature import DENSE, Block, Side
from graphopt.graph import Graph, value_of
from graphopt.passes.kfac_norm import norm_moments
from graphopt.passes.kfac_rnn import rnn_count, rnn_rows
from graphopt.passes.kfac_sites import Site
from graphopt.rewrite import emit

aten = torch.ops.aten
moments = torch.ops.graphopt


@dataclass(frozen=True)
class Batch:
    """How the examples of a batch enter the loss.

    Attributes:
        size: n.
        mean: whether the loss is their mean.
        reduced: whether shared positions are reduced before the moment (``sharing=reduce``).
        samples: whether a solver needs the rows themselves.
    """

    size: int
    mean: bool
    reduced: bool
    samples: bool

    @property
    def undo(self) -> float:
        """What squares of output gradients are multiplied with, to be those of single losses."""
        return float(self.size) ** 2 if self.mean else 1.0


def emit_statistics(
    graph: Graph, site: Site, batch: Batch
) -> tuple[Block, dict[str, fx.Node], str]:
    """Insert the nodes of one block.

    Returns:
        The block, the node of every statistic by name, and how positions are shared.
    """
    block = site.block
    order = {node: i for i, node in enumerate(graph.nodes)}
    swapped = site.swapped or (False,) * len(site.uses)
    uses = sorted(zip(site.uses, swapped, strict=True), key=lambda u: order[u[0].node])
    behind = _behind(uses[-1][0].node)
    if block.kind == "unitwise":
        moments_of = []
        for use in site.uses:
            with graph.fx.inserting_before(_behind(use.node)):
                moments_of.append(norm_moments(graph, block, use, batch.undo / batch.size))
        with graph.fx.inserting_before(behind):
            return block, {block.left.statistic: _sum(graph, moments_of)}, ""
    assert block.right is not None
    scales = _Scales(batch, [u for u, _ in uses])
    parts: dict[str, list[fx.Node]] = {side.statistic: [] for side in block.sides}
    everything = []
    for use, flipped in uses:
        with graph.fx.inserting_before(_behind(use.node)):
            rows = _rows(graph, block, use, batch)
            everything.append(rows)
            if scales.reduced:
                continue
            for side in block.sides:
                of_gradient = (side is block.left) != flipped
                make = rows.gradient if of_gradient else rows.input
                scale = scales.gradient(use) if of_gradient else scales.input(use)
                ones = bool(block.bias) and side is block.right
                parts[side.statistic].append(make(side, ones, scale))
    with graph.fx.inserting_before(behind):
        if scales.reduced:
            rows = _reduce(graph, everything, batch.size)
            for side in block.sides:
                make = rows.gradient if side is block.left else rows.input
                scale = batch.undo / batch.size if side is block.left else 1 / batch.size
                parts[side.statistic] = [
                    make(side, bool(block.bias) and side is block.right, scale)
                ]
        nodes = {name: _sum(graph, made) for name, made in parts.items()}
        if batch.samples and len(everything) == 1 and everything[0].samples is not None:
            names = (f"{block.weight}:g", f"{block.weight}:a")
            block = replace(block, samples=names)
            nodes.update(zip(names, everything[0].samples(bool(block.bias)), strict=True))
    return block, nodes, "reduce" if scales.reduced else "expand"


class _Scales:
    """What the moments of each use are multiplied with."""

    def __init__(self, batch: Batch, uses: Sequence[Use]) -> None:
        self.batch = batch
        self.uses = uses
        self.reduced = batch.reduced and all(_fits(u, batch.size) for u in uses)
        self.rows = sum(_count(u) for u in uses)

    def gradient(self, use: Use) -> float:
        """Of output gradients: a mean over the positions of a convolution, else their sum."""
        scale = self.batch.undo / self.batch.size
        if use.kind == "convolution":
            scale /= _count(use) / self.batch.size
        return scale

    def input(self, use: Use) -> float:
        """Of inputs: a sum over the positions of a convolution, else their mean."""
        if use.kind == "convolution":
            return 1.0 / (self.batch.size * len(self.uses))
        return 1.0 / self.rows


def _count(use: Use) -> int:
    """Rows that a use contributes: examples times shared positions."""
    if use.kind == "rnn":
        return rnn_count(use)
    value: torch.Tensor = value_of(cast("fx.Node", use.node.args[0]))
    if use.kind == "convolution":
        return value.shape[0] * prod(value.shape[2:])
    if use.kind == "embedding":
        return int(value_of(cast("fx.Node", use.node.args[1])).numel())
    return value.shape[-1] * (value.shape[0] if use.summed else 1)


def _fits(use: Use, n: int) -> bool:
    """Whether the rows of a use are the positions of n examples, one example after the other."""
    one = use.summed or value_of(use.node).dim() == 2
    return use.kind == "matmul" and one and _count(use) % n == 0


Moment = Callable[[Side, bool, float], fx.Node]


@dataclass(frozen=True)
class _Rows:
    """Both operands of one use, as makers of moments.

    Attributes:
        gradient: moment of the rows of output gradients.
        input: moment of the rows of inputs.
        nodes: rows of gradients and inputs ``[groups, N, d]``, where they exist as such.
        samples: rows per example ``[n, R, d]``.
    """

    gradient: Moment
    input: Moment
    nodes: tuple[fx.Node, fx.Node] | None = None
    samples: Callable[[bool], tuple[fx.Node, fx.Node]] | None = None


def _rows(graph: Graph, block: Block, use: Use, batch: Batch) -> _Rows:
    if use.kind == "convolution":
        return _convolution(graph, use)
    if use.kind == "embedding":
        return _embedding(graph, use)
    if use.kind == "rnn":
        return _plain(graph, *rnn_rows(graph, use), batch)
    p, q = (cast("fx.Node", a) for a in use.node.args[:2])
    left = _as_rows(graph, emit(graph, aten.transpose.int, p, -2, -1, like=use.node), use)
    right = _as_rows(graph, q, use)
    on_left = p in graph.get(depends_on_tangents)
    return _plain(graph, *((left, right) if on_left else (right, left)), batch)


def _plain(graph: Graph, gradient: fx.Node, x: fx.Node, batch: Batch) -> _Rows:
    """Rows ``[groups, N, d]`` that exist in memory."""
    groups, count, _ = value_of(x).shape

    def samples(ones: bool) -> tuple[fx.Node, fx.Node]:
        return _per_example(graph, gradient, x, batch.size, ones)

    return _Rows(
        lambda side, ones, scale: _moment(graph, gradient, side, ones, scale),
        lambda side, ones, scale: _moment(graph, x, side, ones, scale),
        nodes=(gradient, x),
        samples=samples if groups == 1 and count % batch.size == 0 else None,
    )


def _as_rows(graph: Graph, node: fx.Node, use: Use) -> fx.Node:
    """``[groups, N, d]`` from ``[N, d]``, ``[b, N, d]`` or the parts of a sum."""
    if value_of(node).dim() == 2:
        return emit(graph, aten.unsqueeze.default, node, 0, like=use.node)
    if use.summed:
        width = value_of(node).shape[-1]
        return emit(graph, aten.reshape.default, node, [1, -1, width], like=use.node)
    return node


def _moment(graph: Graph, rows: fx.Node, side: Side, ones: bool, scale: float) -> fx.Node:
    like = rows
    groups = value_of(rows).shape[0]
    if side.form == DENSE:
        pieces = side.blocks // groups
        return emit(
            graph, moments.second_moment.default, rows, ones, pieces, float(scale), like=like
        )
    return emit(graph, moments.diagonal_moment.default, rows, ones, float(scale), like=like)


def _behind(node: fx.Node) -> fx.Node:
    """The node before which statistics go: behind the parts of an operator's result."""
    place = node.next
    while place.target in (getitem, moments.rnn_rows.default):
        place = place.next
    return place


def _sum(graph: Graph, parts: Sequence[fx.Node]) -> fx.Node:
    total = parts[0]
    for part in parts[1:]:
        total = emit(graph, aten.add.Tensor, total, part, like=part)
    return total


def _convolution(graph: Graph, use: Use) -> _Rows:
    arguments: list[Any] = list(use.node.args)
    gradient, x, weight = arguments[:3]
    stride, padding, dilation, transposed, output_padding, groups = arguments[4:10]
    value: torch.Tensor = value_of(gradient)
    kernel = list(value_of(weight).shape[2:])
    # One number stands for all dimensions.
    stride, padding, dilation, output_padding = (
        list(a) * (len(kernel) if len(a) == 1 else 1)
        for a in (stride, padding, dilation, output_padding)
    )

    def of_gradient(side: Side, ones: bool, scale: float) -> fx.Node:
        n, channels = value.shape[:2]
        node = emit(
            graph,
            aten.reshape.default,
            gradient,
            [n, groups, channels // groups, -1],
            like=use.node,
        )
        node = emit(graph, aten.permute.default, node, [1, 0, 3, 2], like=use.node)
        node = emit(
            graph, aten.reshape.default, node, [groups, -1, channels // groups], like=use.node
        )
        return _moment(graph, node, side, ones, scale)

    def of_input(side: Side, ones: bool, scale: float) -> fx.Node:
        geometry = (kernel, stride, padding, dilation, groups, transposed, output_padding, ones)
        if side.form == DENSE:
            return emit(
                graph,
                moments.patch_moment.default,
                x,
                *geometry,
                side.blocks // groups,
                float(scale),
                like=use.node,
            )
        return emit(
            graph, moments.patch_diagonal_moment.default, x, *geometry, float(scale), like=use.node
        )

    return _Rows(of_gradient, of_input)


def _embedding(graph: Graph, use: Use) -> _Rows:
    gradient, indices, size, padding = (cast("Any", a) for a in use.node.args[:4])

    def of_gradient(side: Side, ones: bool, scale: float) -> fx.Node:
        width = value_of(gradient).shape[-1]
        rows = emit(graph, aten.reshape.default, gradient, [1, -1, width], like=use.node)
        if padding >= 0:
            seen = emit(graph, aten.ne.Scalar, indices, padding, like=use.node)
            seen = emit(graph, aten.reshape.default, seen, [1, -1, 1], like=use.node)
            rows = emit(graph, aten.mul.Tensor, rows, seen, like=use.node)
        return _moment(graph, rows, side, ones, scale)

    def of_input(side: Side, ones: bool, scale: float) -> fx.Node:
        counts = emit(
            graph,
            moments.token_counts.default,
            indices,
            size,
            padding,
            1.0,
            like=use.node,
        )
        # Counts are exact in any type; their scale is not.
        counts = _cast(graph, counts, value_of(gradient))
        counts = emit(graph, aten.mul.Tensor, counts, float(scale), like=use.node)
        if side.form == DENSE:
            counts = emit(graph, moments.packed_diagonal.default, counts, like=use.node)
        return counts

    return _Rows(of_gradient, of_input)


def _cast(graph: Graph, node: fx.Node, like: torch.Tensor) -> fx.Node:
    wide = torch.float64 if like.dtype is torch.float64 else torch.float32
    if value_of(node).dtype is wide:
        return node
    return emit(graph, aten._to_copy.default, node, dtype=wide, like=node)


# -- one row per example ---------------------------------------------------------------------------


def _per_example(
    graph: Graph, gradient: fx.Node, x: fx.Node, n: int, ones: bool
) -> tuple[fx.Node, fx.Node]:
    """Rows ``[n, R, d]``."""
    shaped = [
        emit(graph, aten.reshape.default, node, [n, -1, value_of(node).shape[-1]], like=node)
        for node in (gradient, x)
    ]
    if ones:
        shaped[1] = emit(graph, aten.constant_pad_nd.default, shaped[1], [0, 1], 1.0, like=x)
    return shaped[0], shaped[1]


def _reduce(graph: Graph, sides: Sequence[_Rows], n: int) -> _Rows:
    """Sums of output gradients and means of inputs over all positions of an example.

    Eschenhagen et al., arXiv 2311.00636: the "reduce" setting.
    """
    found: tuple[list[fx.Node], list[fx.Node]] = ([], [])
    total = 0
    for side in sides:
        assert side.nodes is not None
        total += value_of(side.nodes[1]).shape[1]
        for node, into in zip(side.nodes, found, strict=True):
            width = value_of(node).shape[-1]
            shaped = emit(graph, aten.reshape.default, node, [n, -1, width], like=node)
            into.append(emit(graph, aten.sum.dim_IntList, shaped, [1], like=node))
    gradient, x = (_sum(graph, nodes) for nodes in found)
    x = emit(graph, aten.div.Scalar, x, total / n, like=x)
    gradient, x = (emit(graph, aten.unsqueeze.default, r, 0, like=r) for r in (gradient, x))
    return _plain(graph, gradient, x, Batch(n, True, False, False))
