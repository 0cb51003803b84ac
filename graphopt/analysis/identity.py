"""When two nodes have the same value, bit for bit, as far as can be told without running them.

Three ways: two views show the same elements of the same tensor; a node copies its operand; two
nodes call the same operator with the same operands.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.graph import value_of

aten = torch.ops.aten

VIEWS = frozenset(
    {
        aten._unsafe_view.default,
        aten.alias.default,
        aten.detach.default,
        aten.diagonal.default,
        aten.expand.default,
        aten.permute.default,
        aten.select.int,
        aten.slice.Tensor,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.t.default,
        aten.transpose.int,
        aten.unfold.default,
        aten.unsqueeze.default,
        aten.view.default,
    }
)
"""Views that only map indices of their first operand to indices.

Chains of them on one tensor that end in the same sizes, strides and offset show the same elements
in the same order. ``as_strided``, which ignores its operand's strides, does not belong here.
"""

# Every number of the first type is one of the second, so a cast there and back changes nothing.
_WIDENS = frozenset(
    {
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float64),
        (torch.float16, torch.float64),
        (torch.float32, torch.float64),
    }
)


def geometry(node: fx.Node) -> tuple[Hashable, ...] | None:
    """Dtype, device, sizes, strides and offset; None for what is not one strided tensor."""
    value = value_of(node)
    if not isinstance(value, Tensor) or value.layout is not torch.strided:
        return None
    sizes, strides, offset = value.shape, value.stride(), value.storage_offset()
    if value.dtype.is_complex:
        return None  # may be conjugated lazily, which strides do not show
    try:
        hash((sizes, offset, strides))
    except TypeError:  # symbolic sizes, whose comparison would add guards
        return (value.dtype, value.device, str(sizes), str(strides), str(offset))
    return (value.dtype, value.device, sizes, strides, offset)


def copied(node: fx.Node) -> fx.Node | None:
    """The node of which `node` is a bit-equal copy in new memory with the same layout, or None.

    Adding zero is no copy, since ``-0.0 + 0.0`` is ``0.0``; multiplying by one is, up to the
    payload of NaNs. A copy that changes strides or starts from an offset is none: kernels may add
    in another order in another layout.
    """
    rule = _COPIES.get(node.target)
    source = rule(node) if rule else None
    if source is None or geometry(node) is None or geometry(source) != geometry(node):
        return None
    return source


def call_key(node: fx.Node) -> Hashable | None:
    """Equal for two calls of one operator with the same operands and numbers, or None.

    Numbers are equal if type and bits are: ``1``, ``1.0`` and ``True`` differ, and so do ``0.0``
    and ``-0.0``.
    """
    key = (node.target, _key(node.args), _key(node.kwargs) if node.kwargs else ())
    try:
        hash(key)
    except TypeError:
        return None
    return key


def _key(value: Any) -> Hashable:
    if isinstance(value, fx.Node):
        return value
    if isinstance(value, list | tuple):
        return (list, *map(_key, value))
    if isinstance(value, dict):
        return (dict, *((name, _key(value[name])) for name in sorted(value)))
    return (type(value), value.hex() if isinstance(value, float) else value)


def _operand(node: fx.Node) -> fx.Node | None:
    return node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None


def _second(node: fx.Node) -> fx.Node | None:
    return node.args[1] if len(node.args) > 1 and isinstance(node.args[1], fx.Node) else None


def _cast_source(node: fx.Node) -> fx.Node | None:
    source = _operand(node)
    if source is None or node.kwargs.get("pin_memory"):
        return None
    if geometry(source) == geometry(node):
        return source
    origin = _operand(source) if source.target is aten._to_copy.default else None
    if origin is None or (_dtype(origin), _dtype(source)) not in _WIDENS:
        return None
    return origin


def _times_one(node: fx.Node) -> fx.Node | None:
    factor = node.args[1] if len(node.args) > 1 else None
    return _operand(node) if type(factor) in (int, float) and factor == 1 else None


def _dtype(node: fx.Node) -> torch.dtype | None:
    return getattr(value_of(node), "dtype", None)


_COPIES: dict[Any, Callable[[fx.Node], fx.Node | None]] = {
    aten.clone.default: _operand,
    aten._to_copy.default: _cast_source,
    aten.copy.default: _second,
    aten.mul.Tensor: _times_one,
    aten.mul.Scalar: _times_one,
    aten.div.Tensor: _times_one,
    aten.div.Scalar: _times_one,
}
