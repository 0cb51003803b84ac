"""What each ATen operator makes of flex tensors.

Operators have rows in tables. One without a row computes: each of its float32 results gets an
exponent of its own.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping

import torch
from torch import Tensor, fx

from graphopt.analysis.hints import elements
from graphopt.graph import value_of
from graphopt.rewrite import arguments


def _names(text: str) -> list[str]:
    return text.split()


# Operators whose results consist of elements of one operand, of their negatives and of zeros. These
# are flex values with the operand's exponent. The position of the operand, and of several results
# the one that it is about.
_MOVES: Mapping[str, tuple[int, int]] = {
    **dict.fromkeys(
        _names(
            """relu threshold_backward hardtanh_backward neg abs clone lift_fresh_copy repeat flip
        roll tril triu reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d
        replication_pad2d replication_pad3d index_select gather index embedding slice_backward
        select_backward upsample_nearest1d upsample_nearest2d upsample_nearest3d
        max_pool2d_with_indices max_pool3d_with_indices adaptive_max_pool2d adaptive_max_pool3d
        amax amin max min sort topk kthvalue mode median"""
        ),
        (0, 0),
    ),
    "copy": (1, 0),
}

# Results that are statistics, or what a backward continues from: only these results are tensors.
_MAIN_RESULTS: Mapping[str, frozenset[int]] = dict.fromkeys(
    _names(
        """native_layer_norm native_group_norm native_batch_norm _fused_rms_norm
        _native_batch_norm_legit _native_batch_norm_legit_functional
        _native_batch_norm_legit_no_training cudnn_batch_norm miopen_batch_norm
        _batch_norm_with_update _batch_norm_with_update_functional
        _scaled_dot_product_flash_attention _scaled_dot_product_flash_attention_for_cpu
        _scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention
        nll_loss_forward nll_loss2d_forward multilabel_margin_loss_forward _ctc_loss
        _weight_norm_interface"""
    ),
    frozenset({0}),
) | {"_thnn_fused_lstm_cell": frozenset({0, 1}), "_thnn_fused_gru_cell": frozenset({0})}

# Operands that are read in float32, by position: running statistics of norms, and probabilities,
# since of one that rounds to 0 or 1 the loss is infinite.
_FLOAT_OPERANDS: Mapping[str, frozenset[int]] = {
    "native_batch_norm": frozenset({3, 4}),
    "_native_batch_norm_legit": frozenset({3, 4}),
    "_native_batch_norm_legit_functional": frozenset({3, 4}),
    "_native_batch_norm_legit_no_training": frozenset({3, 4}),
    "cudnn_batch_norm": frozenset({3, 4}),
    "native_batch_norm_backward": frozenset({3, 4}),
    "cudnn_batch_norm_backward": frozenset({3, 4}),
    "binary_cross_entropy": frozenset({0}),
    "binary_cross_entropy_backward": frozenset({1}),
}

_SOFTMAX = frozenset({"_softmax", "_safe_softmax"})
# What may mask the operand of a softmax: it and the softmax are one operator then.
_BEFORE_SOFTMAX = frozenset({"add", "sub", "where", "masked_fill", "baddbmm"})

_DRAWS = frozenset(_names("""rand randn bernoulli uniform normal exponential geometric cauchy"""))

# A number that large, put in by the program, stands for infinity: what it masks is meant to vanish.
_MASKING = 1e4
_PUTS_IN = frozenset(
    _names("""full full_like new_full scalar_tensor fill masked_fill where constant_pad_nd""")
)
_KEEPS_MASK = frozenset(_names("""add sub where masked_fill cat stack maximum minimum clamp_min"""))


def packet_of(node: fx.Node) -> str:
    """The operator's name without namespace and overload; ``""`` where it is not one of ATen's."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return ""
    return str(target.overloadpacket.__name__)


def is_float32(value: object) -> bool:
    """Whether a fake value is one dense float32 tensor."""
    return (
        isinstance(value, Tensor) and value.dtype is torch.float32 and value.layout is torch.strided
    )


def moved_operand(node: fx.Node, views: frozenset[fx.Node]) -> fx.Node | None:
    """The operand whose elements a node's result consists of, if it only moves or selects."""
    producer, result = _producer(node)
    packet = packet_of(producer)
    position = 0
    if producer not in views and not _selects(producer, packet):
        if packet not in _MOVES or _MOVES[packet][1] != result:
            return None
        position = _MOVES[packet][0]
    found = producer.args[position]
    return found if isinstance(found, fx.Node) else None


def _selects(node: fx.Node, packet: str) -> bool:
    """Whether it moves elements for the arguments that it has here."""
    if packet in ("constant_pad_nd", "masked_fill"):
        return arguments(node).get("value") == 0
    if packet == "max_pool2d_with_indices_backward":
        return not _overlaps(node)
    return packet == "_to_copy"


def is_result(node: fx.Node) -> bool:
    """Whether a value is a tensor of the model: no statistic that its operator gives beside."""
    producer, result = _producer(node)
    wanted = _MAIN_RESULTS.get(packet_of(producer))
    return producer is node or wanted is None or result in wanted


def reads_float(reader: fx.Node, value: fx.Node) -> bool:
    """Whether an operator has to read a value in float32."""
    positions = _FLOAT_OPERANDS.get(packet_of(reader), frozenset())
    if packet_of(reader) == "sigmoid_backward" and is_inside_loss(reader.args[0]):
        positions = frozenset({0, 1})
    return any(reader.args[i] is value for i in positions if i < len(reader.args))


def is_inside_loss(node: object) -> bool:
    """Whether a value is the gradient of probabilities, which has no range of its own.

    It is as large as its probability is small, and the backward of a sigmoid undoes that.
    """
    return isinstance(node, fx.Node) and packet_of(node) == "binary_cross_entropy_backward"


def is_constant(node: fx.Node) -> bool:
    """Whether a value is written in the program."""
    return node.op == "get_attr" or (node.op == "call_function" and not node.all_input_nodes)


def is_drawn(node: fx.Node) -> bool:
    """Whether an operator gives random numbers, computed from nothing else."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return False
    if torch.Tag.nondeterministic_seeded not in target.tags or target.namespace != "aten":
        return False
    return packet_of(node).removesuffix("_like").removesuffix("_functional") in _DRAWS


def masks_of(nodes: tuple[fx.Node, ...], views: frozenset[fx.Node]) -> frozenset[fx.Node]:
    """Values that hold numbers which stand for infinity, and would take all bits of an exponent."""
    found: set[fx.Node] = set()
    for node in nodes:
        if node.op != "call_function":
            continue
        packet = packet_of(node)
        moved = moved_operand(node, views)
        if moved is not None:
            holds = moved in found
        elif packet in _KEEPS_MASK:
            holds = any(operand in found for operand in node.all_input_nodes)
        else:
            holds = False
        if holds or (packet in _PUTS_IN and _puts_in_large(node)) or _scales_up(node, packet):
            found.add(node)
    return frozenset(found)


def is_inside_softmax(node: fx.Node, views: frozenset[fx.Node]) -> bool:
    """Whether a value may be masked and is read by softmaxes only."""
    if packet_of(node) not in _BEFORE_SOFTMAX:
        return False
    readers = list(node.users)
    for reader in readers:
        if reader in views:
            readers.extend(reader.users)
        elif packet_of(reader) not in _SOFTMAX:
            return False
    return any(packet_of(reader) in _SOFTMAX for reader in readers)


def _producer(node: fx.Node) -> tuple[fx.Node, int]:
    """The operator that a value is a result of, and which."""
    if node.target is operator.getitem:
        producer, index = node.args
        assert isinstance(producer, fx.Node)
        assert isinstance(index, int)
        return producer, index
    return node, 0


def _puts_in_large(node: fx.Node) -> bool:
    given = arguments(node)
    names = ("value", "fill_value", "s", "self", "other")
    numbers = [given[n] for n in names if isinstance(given.get(n), int | float)]
    return any(math.isinf(v) or abs(v) >= _MASKING for v in numbers)


def _scales_up(node: fx.Node, packet: str) -> bool:
    """Whether it is ``(1 - mask) * -10000``."""
    return packet == "mul" and any(isinstance(a, int | float) and a <= -_MASKING for a in node.args)


def _overlaps(node: fx.Node) -> bool:
    """Whether windows of a pooling share elements, so that gradients add up."""
    given = arguments(node)
    kernel, stride = given["kernel_size"], given["stride"] or given["kernel_size"]
    if any(d != 1 for d in given["dilation"]):
        return True
    pairs = zip(_pair(kernel), _pair(stride), strict=True)
    return any(size > step for size, step in pairs)


def _pair(value: list[int]) -> list[int]:
    return value if len(value) == 2 else [value[0], value[0]]


def elements_of(node: fx.Node) -> int:
    """How many elements a tensor has in the captured call; 0 where data decide it."""
    return elements(value_of(node)) or 0
