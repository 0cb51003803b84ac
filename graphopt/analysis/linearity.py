"""Whether a backward pass is linear in its tangents, so that scaling them scales every gradient."""

from __future__ import annotations

import operator
from typing import Any, cast

import torch
from torch import fx

from graphopt.graph import Graph
from graphopt.plan import Role

aten = torch.ops.aten

# Linear in each argument that depends on a tangent, as long as just one argument does.
_BY_ONE = frozenset({aten.mm, aten.bmm, aten.mul, aten.dot, aten.mv, aten.convolution})

# Linear in all of their tangent-dependent arguments together.
_JOINTLY = frozenset(
    {
        aten.add,
        aten.sub,
        aten.neg,
        aten.sum,
        aten.mean,
        aten.cat,
        aten.stack,
        aten.view,
        aten._unsafe_view,
        aten.reshape,
        aten.permute,
        aten.transpose,
        aten.t,
        aten.expand,
        aten.squeeze,
        aten.unsqueeze,
        aten.slice,
        aten.select,
        aten.split,
        aten.split_with_sizes,
        aten.unbind,
        aten.clone,
        aten.alias,
        aten.detach,
        aten.flip,
        aten._to_copy,
        aten.slice_backward,
        aten.select_backward,
        aten.as_strided,
        aten.gather,
        aten.index,
        aten.index_select,
        aten.tril,
        aten.triu,
        operator.getitem,
    }
)

# Linear in the gradient that is their first argument; their other arguments are of the forward.
_IN_FIRST = frozenset(
    {
        aten.div,
        aten.threshold_backward,
        aten.gelu_backward,
        aten.silu_backward,
        aten.tanh_backward,
        aten.sigmoid_backward,
        aten.hardtanh_backward,
        aten.hardswish_backward,
        aten.leaky_relu_backward,
        aten.elu_backward,
        aten.softplus_backward,
        aten._softmax_backward_data,
        aten._log_softmax_backward_data,
        aten.native_batch_norm_backward,
        aten.native_layer_norm_backward,
        aten.native_group_norm_backward,
        aten._fused_rms_norm_backward,
        aten.native_dropout_backward,
        aten.convolution_backward,
        aten.max_pool2d_with_indices_backward,
        aten.avg_pool2d_backward,
        aten._adaptive_avg_pool2d_backward,
        aten.embedding_dense_backward,
        aten.nll_loss_backward,
        aten.nll_loss2d_backward,
        aten.mse_loss_backward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward,
        aten._scaled_dot_product_flash_attention_backward,
        aten._scaled_dot_product_efficient_attention_backward,
        aten._scaled_dot_product_cudnn_attention_backward,
    }
)
# Linear as long as everything else that they write is zero: the positions of both arguments.
_BESIDE_ZERO = {
    aten.index_put: (0, 2),
    aten.scatter_add: (0, 3),
    aten.slice_scatter: (0, 1),
    aten.select_scatter: (0, 1),
    aten.masked_fill: (2, 0),
    aten.where: (1, 2),
}


def linear_in_tangents(graph: Graph) -> bool:
    """Whether every gradient is a linear function of the tangents, by a table of operators.

    Gradients in half precision count as not linear, since a scaled one may underflow, and so does
    an operator that is not in the table. A step whose backward also changes state is not linear.
    """
    slots = graph.signature.inputs
    dependent = {n for n, s in zip(graph.inputs, slots, strict=True) if s.role is Role.TANGENT}
    for node in graph.operators:
        mine = [n for n in node.all_input_nodes if n in dependent]
        if not mine:
            continue
        if not _linear(node, set(mine)):
            return False
        dependent.add(node)
    for slot, node in zip(graph.signature.outputs, graph.outputs, strict=True):
        if node in dependent:
            half = node.meta["val"].dtype in (torch.float16, torch.bfloat16)
            if slot.role is Role.MUTATION or half:
                return False
    return True


def _linear(node: fx.Node, dependent: set[fx.Node]) -> bool:
    target = node.target
    packet = target.overloadpacket if isinstance(target, torch._ops.OpOverload) else target
    places = [
        index
        for index, argument in enumerate((*node.args, *node.kwargs.values()))
        if dependent & set(_nodes(argument))
    ]
    if packet in _JOINTLY:
        return packet not in (aten.add, aten.sub) or _both_dependent(node, dependent)
    if packet in _BY_ONE:
        return len(places) == 1
    if packet in _BESIDE_ZERO:
        pair = _BESIDE_ZERO[packet]
        return set(places) <= set(pair) and all(_scales(node.args[i], dependent) for i in pair)
    if packet is aten.constant_pad_nd:
        return len(node.args) < 3 or bool(node.args[2] == 0)
    return packet in _IN_FIRST and places == [0]


def _both_dependent(node: fx.Node, dependent: set[fx.Node]) -> bool:
    """A sum with a term that does not scale is affine, not linear."""
    return all(a in dependent for a in node.args[:2])


def _scales(value: object, dependent: set[fx.Node]) -> bool:
    """A function of a tangent, or zero."""
    if not isinstance(value, fx.Node):
        return bool(value == 0)
    packet = getattr(value.target, "overloadpacket", None)
    if packet in (aten.full, aten.full_like, aten.scalar_tensor):
        return bool(value.args[0 if packet is aten.scalar_tensor else 1] == 0)
    return value in dependent or packet in (aten.zeros, aten.zeros_like, aten.new_zeros)


def _nodes(argument: object) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.map_arg(cast("Any", argument), found.append)
    return found
