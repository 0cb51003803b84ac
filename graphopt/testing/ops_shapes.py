"""Views, copies, casts and reductions that generated graphs are made of.

Each function reads its decisions from `Choices`, takes operands from the `Builder` and returns the
values that it made. Functions of `torch` stand for the ATen operators that they dispatch to.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

from graphopt.testing.builder import MAX_NUMEL, Builder, Choices, is_fixed, least, numel
from graphopt.testing.recording import aten


def reshape(b: Builder, c: Choices) -> Tensor:
    """Another shape of the same elements, or the same shape."""
    value = b.value(c)
    shape = list(value.shape)
    options = [shape, [-1], [*shape, 1], [1, *shape]]
    options += [[shape[0], -1], [-1, shape[-1]]] if shape else []
    return torch.reshape(value, c.pick([o for o in options if len(o) <= 5]))


def transpose(b: Builder, c: Choices) -> Tensor:
    """Dimensions in another order; now and then there and back."""
    value = b.value(c, lambda v: v.ndim >= 2)
    if value.ndim == 2 and c.flag():
        result = torch.t(value)
        return torch.t(result) if c.flag() else result
    if c.flag():
        shift = c.integer(0, value.ndim - 1)
        return torch.permute(value, [(i + shift) % value.ndim for i in range(value.ndim)])
    return torch.transpose(value, c.integer(0, value.ndim - 1), -1)


def expand(b: Builder, c: Choices) -> Tensor:
    """A new dimension, repeated without a copy."""
    value = b.value(c, lambda v: v.ndim <= 4 and numel(v) <= MAX_NUMEL)
    return torch.unsqueeze(value, 0).expand(c.integer(1, 3), *value.shape)


def unsqueeze(b: Builder, c: Choices) -> Tensor:
    """A dimension of size one more, or all of them fewer."""
    value = b.value(c)
    if c.flag() or value.ndim >= 5:
        return torch.squeeze(value)
    return torch.unsqueeze(value, c.integer(0, value.ndim))


def cat(b: Builder, c: Choices) -> Tensor:
    """One, two or three tensors in a row."""
    value = b.value(c, lambda v: v.ndim >= 1)
    dim = c.integer(0, value.ndim - 1)

    def fits(other: Tensor) -> bool:
        a, o = list(value.shape), list(other.shape)
        return (
            other.dtype is value.dtype
            and len(a) == len(o)
            and all(
                statically_known_true(m == n)
                for m, n in zip(a[:dim] + a[dim + 1 :], o[:dim] + o[dim + 1 :], strict=True)
            )
        )

    count = c.integer(0, 2) if numel(value) <= MAX_NUMEL else 0
    return torch.cat([value, *(b.value(c, fits) for _ in range(count))], dim)


def split(b: Builder, c: Choices) -> tuple[Tensor, ...]:
    """A tensor in pieces (an operator with several results)."""
    value = b.value(c, lambda v: any(map(is_fixed, v.shape)))
    dim = c.pick([d for d, size in enumerate(value.shape) if is_fixed(size)])
    if c.flag():
        return tuple(torch.unbind(value, dim))
    return tuple(torch.split(value, c.integer(1, value.shape[dim]), dim))


def slicing(b: Builder, c: Choices) -> Tensor:
    """A part of one dimension, possibly all of it."""
    value = b.value(c, lambda v: v.ndim >= 1)
    dim = c.integer(0, value.ndim - 1)
    if c.flag():
        return torch.select(value, dim, c.integer(0, least(value.shape[dim]) - 1))
    return torch.narrow(value, dim, 0, value.shape[dim] - c.integer(0, least(value.shape[dim]) - 1))


def copies(b: Builder, c: Choices) -> Tensor:
    """What changes nothing: a clone, an alias, a cut from autograd, a cast to the same type."""
    value = b.value(c)
    options: list[Callable[[], Tensor]] = [
        lambda: torch.clone(value),
        lambda: torch.clone(value, memory_format=torch.contiguous_format),
        lambda: torch.detach(value),
        lambda: aten.alias.default(value),
        lambda: aten._to_copy.default(value, dtype=value.dtype),
    ]
    return c.pick(options)()


def cast(b: Builder, c: Choices) -> Tensor:
    """Another floating type; now and then there and back."""
    value = b.value(c)
    dtypes = (torch.bfloat16, torch.float32, torch.float64)
    result = value.to(c.pick([dtype for dtype in dtypes if dtype != value.dtype]))
    return result.to(value.dtype) if c.flag() else result


def reduction(b: Builder, c: Choices) -> Tensor:
    """A sum, mean or maximum over one or all dimensions."""
    value = b.value(c)
    kind = c.integer(0, 2)
    if not value.ndim or c.flag():
        return torch.sum(value) if kind == 0 else torch.mean(value)
    dim, keepdim = [c.integer(0, value.ndim - 1)], c.flag()
    if kind == 2:
        return torch.amax(value, dim, keepdim)
    return torch.sum(value, dim, keepdim) if kind == 0 else torch.mean(value, dim, keepdim)
