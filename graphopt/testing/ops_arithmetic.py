"""Expressions that generated graphs are made of: pointwise, random, repeated.

Each function reads its decisions from `Choices`, takes operands from the `Builder` and returns the
values that it made. Functions of `torch` stand for the ATen operators that they dispatch to.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn import functional as F

from graphopt.testing.builder import Builder, Choices, is_fixed
from graphopt.testing.recording import aten

Unary = Callable[[Tensor], Tensor]
Binary = Callable[[Tensor, Tensor | float], Tensor]

# Bounded or slowly growing, so that chains of them stay far from overflow.
_UNARY: tuple[Unary, ...] = (
    torch.relu,
    torch.neg,
    torch.sigmoid,
    torch.tanh,
    torch.abs,
    torch.cos,
    torch.sin,
    torch.square,
    F.gelu,
    F.silu,
    F.softplus,
    F.hardtanh,
    F.leaky_relu,
    F.elu,
)
_BINARY: tuple[Binary, ...] = (torch.add, torch.mul, torch.sub, torch.div)
_NUMBERS = (1.0, 0.0, 1, 0, 2, 0.5)


def unary(b: Builder, c: Choices) -> Tensor:
    """A pointwise function of one tensor."""
    return c.pick(_UNARY)(b.value(c))


def with_scalar(b: Builder, c: Choices) -> Tensor:
    """A tensor and a number, often the neutral one."""
    function = c.pick(_BINARY)
    numbers = [n for n in _NUMBERS if n] if function is torch.div else _NUMBERS
    return function(b.value(c), c.pick(numbers))


def binary(b: Builder, c: Choices) -> Tensor:
    """Two tensors that broadcast; a parameter where none does."""
    function = c.pick(_BINARY)
    left = b.value(c)
    if c.integer(0, 3) == 3 and is_fixed(*left.shape[-1:]):
        right = b.param("scale", left.shape[-1:], c)
    else:
        right = b.value(c, lambda v: _broadcasts(v, left))
    return function(left, right * right + 1.0 if function is torch.div else right)


def _broadcasts(one: Tensor, other: Tensor) -> bool:
    pairs = zip(reversed(one.shape), reversed(other.shape), strict=False)
    return all(
        statically_known_true(m == n) or (is_fixed(m) and m == 1) or (is_fixed(n) and n == 1)
        for m, n in pairs
    )


def compare_and_select(b: Builder, c: Choices) -> Tensor:
    """A mask from a comparison, then a choice by it."""
    value = b.value(c)
    mask = torch.gt(value, 0.0)
    if c.flag():
        return torch.masked_fill(value, mask, c.pick([0.0, 1.0, -1.0]))
    return torch.where(mask, value, torch.neg(value))


def constant(b: Builder, c: Choices) -> Tensor:
    """A value combined with a constant made by a factory or stored on the module."""
    value = b.value(c)
    number = c.pick((0.0, 1.0, 2.0))
    options: list[Callable[[], Tensor]] = [
        lambda: aten.scalar_tensor.default(number),
        lambda: aten.full.default(list(value.shape), number),
        lambda: aten.ones_like.default(value),
        lambda: b.recorder.constant([(i + 1) / 8 for i in range(max(value.shape[-1:], default=1))]),
        lambda: aten.arange.default(max(value.shape[-1:], default=1), dtype=torch.float32),
    ]
    if not is_fixed(*value.shape[-1:]):
        options = options[:3]
    other = c.pick(options)()
    return torch.mul(value, other) if c.flag() else torch.add(value, other)


def duplicate(b: Builder, c: Choices) -> Tensor | None:
    """An earlier call once more, random ones included."""
    calls = b.recorder.calls
    if not calls:
        return None
    func, args, kwargs = c.recent(calls)
    again = func(*args, **kwargs)
    result: Tensor = again if isinstance(again, Tensor) else again[0]
    return result if result.is_floating_point() else None


def dropout(b: Builder, c: Choices) -> Tensor:
    """Dropout, or a random mask made by hand."""
    value = b.value(c)
    kind = c.integer(0, 2)
    if kind == 0:
        result: Tensor = aten.native_dropout.default(value, 0.5, True)[0]
        return result
    if kind == 1:
        return torch.mul(value, aten.bernoulli.p(torch.detach(value), 0.5))
    return torch.add(value, aten.rand_like.default(value))
