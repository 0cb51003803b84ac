"""Statistics of parameters that scale or shift elementwise: norms, and whatever sums over examples.

Each channel has its own block of the Fisher matrix: of the scale, the shift, or both (the unit-wise
approximation of Osawa et al., arXiv 2002.06015).
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import fx

import graphopt.ops.moments  # noqa: F401  (defines the operators)
from graphopt.analysis.weight_uses import Use
from graphopt.graph import Graph, value_of
from graphopt.plan.kfac import Block
from graphopt.rewrite import emit
from graphopt.size_nodes import Scale, Size, Sizes, as_float

aten = torch.ops.aten
moments = torch.ops.graphopt


def norm_moments(graph: Graph, block: Block, use: Use, scale: Scale, sizes: Sizes) -> fx.Node:
    """The unit-wise moments of a block, of shape [channels, 1 or 3]."""
    if use.kind == "norm":
        return _norm(graph, block, use, scale, sizes)
    summand = _per_example(graph, use, sizes)
    squares = emit(
        graph, moments.diagonal_moment.default, summand, False, as_float(scale), like=use.node
    )
    return emit(graph, aten.reshape.default, squares, [-1, 1], like=use.node)


def _per_example(graph: Graph, use: Use, sizes: Sizes) -> fx.Node:
    """Contributions of each example to the gradient, ``[1, n, P]``."""
    operand = cast("fx.Node", use.node.args[0])
    rank, n = value_of(operand).dim(), sizes.of(operand, 0)
    if use.kind == "convolution":  # the bias of a convolution whose weight is left alone
        dims = list(range(2, rank))
    else:
        given = cast("list[int]", use.node.args[1]) if len(use.node.args) > 1 else range(rank)
        dims = sorted({d % rank for d in given} - {0})
    if dims:
        operand = emit(graph, aten.sum.dim_IntList, operand, dims, like=use.node)
    return emit(graph, aten.reshape.default, operand, [1, n, -1], like=use.node)


def _norm(graph: Graph, block: Block, use: Use, scale: Scale, sizes: Sizes) -> fx.Node:
    gradient, x, mean, rstd, statistics, parameter = _FORMS[use.node.target](graph, use.node, sizes)
    shift_alone = use.index == 2
    both = bool(block.bias) or shift_alone
    found = emit(
        graph,
        moments.norm_moment.default,
        gradient,
        x,
        mean,
        rstd,
        statistics,
        parameter,
        both,
        as_float(scale),
        like=use.node,
    )
    return emit(graph, aten.slice.Tensor, found, 1, 2, 3, like=use.node) if shift_alone else found


Form = tuple[fx.Node, fx.Node, fx.Node | None, fx.Node, list[Size], list[int]]


def _batch_norm(graph: Graph, node: fx.Node, sizes: Sizes) -> Form:
    arguments: list[Any] = list(node.args)
    gradient, x = arguments[:2]
    if node.target is aten.cudnn_batch_norm_backward.default:
        x, gradient = arguments[:2]
        training, eps = True, arguments[7]
    else:
        training, eps = arguments[7:9]
    shape = value_of(x).shape
    channels = [1, int(shape[1]), *[1] * (len(shape) - 2)]
    mean, rstd = arguments[5:7]
    if not training:
        mean = arguments[3]
        shifted = emit(graph, aten.add.Scalar, arguments[4], eps, like=node)
        rstd = emit(graph, aten.rsqrt.default, shifted, like=node)
    return gradient, x, mean, rstd, list(channels), channels


def _layer_norm(graph: Graph, node: fx.Node, sizes: Sizes) -> Form:
    gradient, x, shape, mean, rstd = cast("Any", node.args[:5])
    return gradient, x, mean, rstd, sizes.all_of(mean), _trailing(x, shape)


def _rms_norm(graph: Graph, node: fx.Node, sizes: Sizes) -> Form:
    gradient, x, shape, rstd = cast("Any", node.args[:4])
    return gradient, x, None, rstd, sizes.all_of(rstd), _trailing(x, shape)


def _group_norm(graph: Graph, node: fx.Node, sizes: Sizes) -> Form:
    gradient, x, mean, rstd, _, n, channels, positions, groups = cast("Any", node.args[:9])
    shape = [n, groups, channels // groups, positions]
    gradient, x = (emit(graph, aten.reshape.default, v, shape, like=node) for v in (gradient, x))
    return gradient, x, mean, rstd, [n, groups, 1, 1], [1, groups, channels // groups, 1]


def _trailing(x: fx.Node, shape: list[int]) -> list[int]:
    rank = value_of(x).dim() - len(shape)
    return [1] * rank + list(shape)


_FORMS: dict[Any, Any] = {
    aten.native_batch_norm_backward.default: _batch_norm,
    aten.cudnn_batch_norm_backward.default: _batch_norm,
    aten.native_layer_norm_backward.default: _layer_norm,
    aten.native_group_norm_backward.default: _group_norm,
    aten._fused_rms_norm_backward.default: _rms_norm,
}
