"""What each ATen operator makes of lower precision.

The four kinds are those of TensorFlow's graph pass for mixed precision (``auto_mixed_precision``
of grappler): *allow* gains much and accumulates in float32 inside; *infer* is safe unless something
unsafe is upstream; *clear* moves or selects values, so that rounding before it is rounding after
it; *deny* needs float32 for its range or its sums. An operator without a row stays in float32 and
is listed.
"""

from __future__ import annotations

import operator
from enum import StrEnum

import torch
from torch import fx

from graphopt.analysis.aliasing import storage
from graphopt.graph import Graph
from graphopt.ops.numbers import number_function
from graphopt.passes.precision.formats import Format


class Kind(StrEnum):
    """How an operator takes to lower precision."""

    ALLOW = "allow"
    INFER = "infer"
    CLEAR = "clear"
    DENY = "deny"


def _rows(kind: Kind, names: str) -> dict[str, Kind]:
    return dict.fromkeys(names.split(), kind)


_KINDS = {
    **_rows(
        Kind.ALLOW,
        """mm addmm bmm baddbmm mv convolution convolution_backward
        _scaled_dot_product_flash_attention _scaled_dot_product_flash_attention_backward
        _scaled_dot_product_flash_attention_for_cpu
        _scaled_dot_product_flash_attention_for_cpu_backward
        _scaled_dot_product_efficient_attention _scaled_dot_product_efficient_attention_backward
        _scaled_dot_product_cudnn_attention _scaled_dot_product_cudnn_attention_backward""",
    ),
    **_rows(
        Kind.INFER,
        """add sub mul div neg reciprocal rsqrt sqrt abs lerp
        gelu gelu_backward silu silu_backward tanh tanh_backward sigmoid sigmoid_backward
        elu elu_backward leaky_relu leaky_relu_backward hardswish hardswish_backward hardsigmoid
        hardsigmoid_backward mish mish_backward
        avg_pool2d avg_pool2d_backward _adaptive_avg_pool2d _adaptive_avg_pool2d_backward
        _native_batch_norm_legit_functional native_batch_norm_backward
        _native_batch_norm_legit_no_training
        _softmax _safe_softmax _softmax_backward_data native_dropout native_dropout_backward
        upsample_nearest2d upsample_nearest2d_backward
        upsample_bilinear2d upsample_bilinear2d_backward""",
    ),
    **_rows(
        Kind.CLEAR,
        """relu threshold_backward hardtanh hardtanh_backward clamp clamp_min clamp_max maximum
        minimum max_pool2d_with_indices max_pool2d_with_indices_backward sign
        clone cat stack where masked_fill copy repeat flip roll constant_pad_nd reflection_pad2d
        index_select gather slice_backward select_backward slice_scatter select_scatter""",
    ),
    **_rows(
        Kind.DENY,
        """exp expm1 log log1p log2 pow var var_mean cumsum prod norm linalg_vector_norm
        _log_softmax _log_softmax_backward_data nll_loss_forward nll_loss_backward
        nll_loss2d_forward nll_loss2d_backward mse_loss mse_loss_backward smooth_l1_loss
        smooth_l1_loss_backward binary_cross_entropy binary_cross_entropy_backward
        native_layer_norm native_layer_norm_backward native_group_norm native_group_norm_backward
        embedding_dense_backward _embedding_bag _embedding_bag_backward index_add scatter_add
        _weight_norm_interface _weight_norm_interface_backward sin cos erfinv
        scalar_tensor full zeros zeros_like ones ones_like full_like new_zeros new_full""",
    ),
}

# Their sums are made in float32 and only the result is rounded, so they are denied where it may
# overflow.
_SUMS = frozenset({"sum", "mean"})

# Arguments that stay in float32 where the operator is lowered, by position: weights and statistics
# of norms, and what an attention saves of its softmax.
KEPT_ARGUMENTS = {
    "_native_batch_norm_legit_functional": frozenset({1, 2, 3, 4}),
    "_native_batch_norm_legit_no_training": frozenset({1, 2, 3, 4}),
    "native_batch_norm_backward": frozenset({2, 3, 4, 5, 6}),
    "_scaled_dot_product_flash_attention_backward": frozenset({5}),
    "_scaled_dot_product_flash_attention_for_cpu_backward": frozenset({5}),
    "_scaled_dot_product_efficient_attention_backward": frozenset({6}),
    "_scaled_dot_product_cudnn_attention_backward": frozenset({5}),
}

# Results without a cast behind them: statistics of norms, which are float32 where the weights are.
KEPT_RESULTS = {"_native_batch_norm_legit_functional": frozenset({1, 2, 3, 4})}


def packet_of(node: fx.Node) -> str:
    """The operator's name without namespace and overload; ``""`` where it is not one of ATen's."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return ""
    return str(target.overloadpacket.__name__)


def kinds(graph: Graph, format: Format) -> dict[fx.Node, Kind | None]:
    """The kind of every operator; ``None`` where there is no row for it. Views are clear.

    What computes sizes is none: it is the same in every format.
    """
    views = graph.get(storage).views
    rows = _KINDS | dict.fromkeys(_SUMS, Kind.INFER if format.wide else Kind.DENY)
    return {
        node: Kind.CLEAR if node in views else rows.get(packet_of(node))
        for node in graph.operators
        if node.target is not operator.getitem and not number_function(node.target)
    }
