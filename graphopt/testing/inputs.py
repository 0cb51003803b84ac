"""Real tensors for the placeholders of a graph."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.errors import ArgumentError
from graphopt.graph import Graph, value_of
from graphopt.plan import Role
from graphopt.testing.sizes import At, Sizes, hints_of

aten = torch.ops.aten

# Operators that read whole numbers as positions: the operand that is indexed, and its dimension.
_ROWS = {
    aten.embedding.default: (1, 0, 0),
    aten.nll_loss_forward.default: (1, 0, 1),
    aten.index_select.default: (2, 0, None),
    aten.gather.default: (2, 0, None),
}
_DEFAULT_LIMIT = 2


def inputs_for(graph: Graph, seed: int = 0, sizes: Sizes | None = None) -> list[Any]:
    """One real tensor per placeholder, on its device and with its strides; a function of the seed.

    A placeholder that is a size gets a whole number, as `sizes` says or as in the captured call.
    Floating inputs are normal, buffers lie in [0.5, 1.5) so that they can be variances. Whole
    numbers stay below the number of rows, classes or entries that operators index with them,
    looking through views and casts; elsewhere they are 0 or 1.
    """
    generator = torch.Generator().manual_seed(seed)
    given = hints_of(graph) | dict(sizes or {})
    at = At(graph, given)
    result: list[Any] = []
    for node, slot in zip(graph.inputs, graph.signature.inputs, strict=True):
        fake = value_of(node)
        if slot.role is Role.SIZE:
            result.append(given.get(slot.name, fake))
            continue
        if not isinstance(fake, Tensor):
            raise ArgumentError("an input is not a tensor", where=f"{slot} ({node.name})")
        shape = at.shape(fake.shape)
        if fake.dtype.is_floating_point or fake.dtype.is_complex:
            if slot.role is Role.BUFFER:
                values = torch.rand(shape, generator=generator) + 0.5
            else:
                values = torch.randn(shape, generator=generator)
        else:
            limit = 2 if fake.dtype is torch.bool else _limit(node, at)
            values = torch.randint(0, limit, shape, generator=generator)
        result.append(_like(fake, values, at))
    return result


def _like(fake: Tensor, values: Tensor, at: At) -> Tensor:
    real = torch.empty_strided(
        at.shape(fake.shape), at.shape(fake.stride()), dtype=fake.dtype, device=fake.device
    )
    return real.copy_(values)


def _limit(node: fx.Node, at: At) -> int:
    """The largest number of entries that every operator indexing with `node` has."""
    limits, seen, todo = [], {node}, [node]
    while todo:
        current = todo.pop()
        for user in current.users:
            if user.target in _ROWS:
                index, table, dim = _ROWS[user.target]
                if user.args[index] is current:
                    limits.append(at(_size(user, table, dim)))
            elif user not in seen and _is_integer(user):
                seen.add(user)
                todo.append(user)
    return min(limits, default=_DEFAULT_LIMIT)


def _size(user: fx.Node, table: int, dim: int | None) -> Any:
    operand = user.args[table]
    position = user.args[1] if dim is None else dim
    assert isinstance(operand, fx.Node)
    assert isinstance(position, int)
    return value_of(operand).shape[position]


def _is_integer(node: fx.Node) -> bool:
    value = value_of(node)
    is_tensor = isinstance(value, Tensor) and node.target is not operator.getitem
    return is_tensor and not (value.dtype.is_floating_point or value.dtype.is_complex)
