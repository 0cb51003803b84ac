"""Convolutions over single pixels, which a compiler runs as products of matrices."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

_PRODUCTS = frozenset({aten.bmm.default, aten.baddbmm.default})


def is_product(weight: fx.Node, stride: Any, padding: Any, dilation: Any, groups: int) -> bool:
    """Whether a convolution multiplies the channels of each pixel by a matrix."""
    ones = (*weight.meta["val"].shape[2:], *stride, *dilation, groups)
    return all(n == 1 for n in ones) and not any(padding)


def is_product_node(node: fx.Node) -> bool:
    """Whether a node is such a convolution, or else a product of several matrices."""
    return node.target in _PRODUCTS or _is_convolution(node)


def _is_convolution(node: fx.Node) -> bool:
    if node.target is not aten.convolution.default or node.meta["val"].dim() != 4:
        return False
    _, weight, _, stride, padding, dilation, transposed, _, groups = node.args
    return not transposed and is_product(weight, stride, padding, dilation, groups)  # type: ignore[arg-type]


def add_biases_apart(graph: fx.Graph) -> None:
    """Add the biases of these convolutions afterwards, in the same pass as what comes then.

    The kernel of a product writes the bias first and reads it again; a compiler fuses an addition.
    """
    for node in filter(_is_convolution, list(graph.nodes)):
        x, weight, bias, *rest = node.args
        if not isinstance(bias, fx.Node):
            continue
        shape = [node.meta["val"].shape[1], 1, 1]
        with graph.inserting_before(node):
            bare = graph.call_function(node.target, (x, weight, None, *rest))
            column = graph.call_function(aten.view.default, (bias, shape))
            added = graph.call_function(aten.add.Tensor, (bare, column))
        bare.meta, added.meta = dict(node.meta), dict(node.meta)
        column.meta = {"val": bias.meta["val"].view(shape)}
        node.replace_all_uses_with(added)
        graph.erase_node(node)
