"""Put the statistics of the curvature into the backward graph, next to the weight gradients.

Scales follow SP-NGD (Osawa et al., arXiv 2002.06015) with n examples, T positions of a
convolution and R shared positions of any other weight: for ``A`` 1/n over a convolution's patches
and 1/(nR) otherwise, for ``G`` 1/(nT) and 1/n, where output gradients are those of one example's
loss, so the 1/n of a mean over examples is undone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import getitem
from typing import cast

from torch import fx

from graphopt.analysis.weight_uses import Use
from graphopt.graph import Graph
from graphopt.passes.kfac.norm import norm_moments
from graphopt.passes.kfac.rnn import ROWS, rnn_count
from graphopt.passes.kfac.rows import (
    add_up,
    add_up_side,
    examples_first,
    reduced,
    rows_of,
    with_ones,
)
from graphopt.passes.kfac.sites import Site
from graphopt.plan.kfac import Block
from graphopt.size_nodes import Scale, Size, Sizes


@dataclass(frozen=True)
class Batch:
    """How the examples of a batch enter the loss.

    Attributes:
        sizes: of the tensors of the graph.
        size: n.
        mean: whether the loss is their mean.
        reduced: whether shared positions are reduced before the moment (``sharing=reduce``).
        samples: whether a solver needs the rows themselves.
    """

    sizes: Sizes
    size: Size
    mean: bool
    reduced: bool
    samples: bool

    def scale(self, like: fx.Node, rows: Size | None = None) -> Scale:
        """Of squares of output gradients: a mean over rows, by default over the examples.

        Where the loss is a mean over the n examples, gradients were divided by n.
        """
        if rows is None:
            return self.size if self.mean else self.sizes.quotient(1, self.size, like)
        over = self.sizes.product((self.size, self.size), like) if self.mean else 1
        return self.sizes.quotient(over, rows, like)


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
                scale = batch.scale(use.node)
                moments_of.append(norm_moments(graph, block, use, scale, batch.sizes))
        with graph.fx.inserting_before(behind):
            return block, {block.left.statistic: add_up(graph, moments_of)}, ""
    assert block.right is not None
    scales = _Scales(batch, [u for u, _ in uses])
    size = batch.size
    parts: dict[str, list[fx.Node]] = {side.statistic: [] for side in block.sides}
    everything = []
    for use, flipped in uses:
        with graph.fx.inserting_before(_behind(use.node)):
            rows = rows_of(graph, use, size, batch.sizes)
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
            rows = reduced(graph, everything, size, batch.sizes)
            like = uses[-1][0].node
            for side in block.sides:
                make = rows.gradient if side is block.left else rows.input
                of_gradient = side is block.left
                scale = batch.scale(like) if of_gradient else batch.sizes.quotient(1, size, like)
                parts[side.statistic] = [
                    make(side, bool(block.bias) and side is block.right, scale)
                ]
        nodes = {
            side.statistic: add_up_side(graph, parts[side.statistic], side) for side in block.sides
        }
        if batch.samples and len(everything) == 1 and everything[0].by_example is not None:
            names = (f"{block.weight}:g", f"{block.weight}:a")
            block = replace(block, samples=names)
            gradient, x = everything[0].by_example()
            x = with_ones(graph, x) if block.bias else x
            nodes.update(zip(names, (gradient, x), strict=True))
    return block, nodes, "reduce" if scales.reduced else "expand"


class _Scales:
    """What the moments of each use are multiplied with."""

    def __init__(self, batch: Batch, uses: Sequence[Use]) -> None:
        self.batch = batch
        self.uses = uses
        self.reduced = batch.reduced and all(
            examples_first(u, batch.size) is not None for u in uses
        )

    def gradient(self, use: Use) -> Scale:
        """Of output gradients: a mean over the positions of a convolution, else their sum."""
        if use.kind == "convolution":
            return self.batch.scale(use.node, _count(use, self.batch.sizes))
        return self.batch.scale(use.node)

    def input(self, use: Use) -> Scale:
        """Of inputs: a sum over the positions of a convolution, else their mean."""
        sizes, like = self.batch.sizes, use.node
        if use.kind == "convolution":
            rows = sizes.product((self.batch.size, len(self.uses)), like)
        else:
            rows = sizes.sum([_count(u, sizes) for u in self.uses], like)
        return sizes.quotient(1, rows, like)


def _count(use: Use, sizes: Sizes) -> Size:
    """Rows that a use contributes: examples times shared positions."""
    if use.kind == "rnn":
        return rnn_count(use, sizes)
    operand = cast("fx.Node", use.node.args[use.kind == "embedding"])
    found = sizes.all_of(operand)
    if use.kind == "convolution":
        del found[1]
    elif use.kind == "matmul":
        found = [found[-1], *found[:1]] if use.summed else found[-1:]
    return sizes.product(found, use.node)


def _behind(node: fx.Node) -> fx.Node:
    """The node before which statistics go: behind the parts of an operator's result."""
    place = node.next
    while place.target in (getitem, ROWS):
        place = place.next
    return place
