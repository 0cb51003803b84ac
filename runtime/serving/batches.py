"""Requests as rows of a batch, and a batch's outputs as answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from graphopt.errors import ArgumentError, RequestError, ServingError

Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Form:
    """What each request looks like: the form of an example.

    Attributes:
        spec: how the tensors make up a request.
        names: what each tensor is called in messages.
        shapes: of each tensor, without a batch dimension.
        dtypes: of each tensor.
        device: of all tensors.
    """

    spec: pytree.TreeSpec
    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    dtypes: tuple[torch.dtype, ...]
    device: torch.device

    @classmethod
    def of(cls, example: object) -> Form:
        """The form of one request: a tensor, a tuple of positional arguments, or a dict.

        Raises:
            ArgumentError: it holds no tensor or something else, or tensors on several devices.
        """
        found, spec = pytree.tree_flatten_with_path(_tidy(example))
        names = tuple(_name(path) for path, _ in found)
        for name, (_, leaf) in zip(names, found, strict=True):
            if not isinstance(leaf, Tensor):
                raise ArgumentError(
                    f"a request may hold tensors only, and {name} of the example is a "
                    f"{type(leaf).__name__}",
                    hint="make it a tensor, or fix it in a module around the model",
                )
        leaves = [leaf for _, leaf in found]
        if not leaves:
            raise ArgumentError("the example holds no tensor", hint="serve(model, example)")
        if len({leaf.device for leaf in leaves}) != 1:
            raise ArgumentError(
                f"the example has tensors on {len({leaf.device for leaf in leaves})} devices",
                hint="serve(model, example) with the tensors of one request, all on one device",
            )
        return cls(
            spec,
            names,
            tuple(leaf.shape for leaf in leaves),
            tuple(leaf.dtype for leaf in leaves),
            leaves[0].device,
        )

    def rows(self, request: object) -> list[Tensor]:
        """The tensors of one request.

        Raises:
            RequestError: it does not have this form.
        """
        leaves, spec = pytree.tree_flatten(_tidy(request))
        if spec != self.spec:
            raise RequestError(
                f"a request holds {_count(len(leaves))} in another arrangement than the example's "
                f"{', '.join(self.names)}",
                hint="send what the example given to serve() has",
            )
        for name, leaf, shape, dtype in zip(
            self.names, leaves, self.shapes, self.dtypes, strict=True
        ):
            if not isinstance(leaf, Tensor):
                raise RequestError(
                    f"{name} is a {type(leaf).__name__} and not a tensor", hint="torch.as_tensor"
                )
            if leaf.shape != shape or leaf.dtype != dtype or leaf.device != self.device:
                wanted = describe(shape, dtype, self.device)
                raise RequestError(
                    f"{name} is {describe(leaf.shape, leaf.dtype, leaf.device)}, and {wanted} is "
                    "served",
                    hint="send one example without a batch dimension, in the shape, dtype and "
                    "device of the example given to serve()",
                )
        return leaves

    def batch(self, rows: Sequence[Sequence[Tensor]], size: int, device: torch.device) -> Call:
        """Positional and keyword arguments of a call with `size` rows.

        Rows that are missing are copies of the first one, so that padding is always something that
        the model may be given.
        """
        padded = [*rows, *[rows[0]] * (size - len(rows))]
        stacked = [torch.stack(column).to(device) for column in zip(*padded, strict=True)]
        inputs = pytree.tree_unflatten(stacked, self.spec)
        if isinstance(inputs, dict):
            return (), inputs
        return (inputs if isinstance(inputs, tuple) else (inputs,)), {}


def split(outputs: object, size: int, count: int, device: torch.device) -> list[object]:
    """The answers to the first `count` rows of a batch of `size`.

    Each has the structure of the outputs, with one row in place of each tensor, and memory of its
    own on `device`. What is no tensor is the same in all.

    Raises:
        ServingError: an output has no batch dimension.
    """
    leaves, spec = pytree.tree_flatten(outputs)
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor) and leaf.shape[:1] != (size,):
            raise ServingError(
                f"output {i} has shape {tuple(leaf.shape)} for a batch of {size}, so it cannot be "
                "divided among requests",
                hint="return tensors whose first dimension is the batch",
            )
    leaves = [leaf.to(device) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    return [
        pytree.tree_unflatten([x[i].clone() if isinstance(x, Tensor) else x for x in leaves], spec)
        for i in range(count)
    ]


def describe(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> str:
    """A kind of tensor in a few words, as ``float32[3, 8] on cpu``."""
    return f"{str(dtype).removeprefix('torch.')}{list(shape)} on {device}"


def _tidy(request: object) -> object:
    """A list of arguments is a tuple of them; the order of keys counts nowhere."""
    return tuple(request) if isinstance(request, list) else _sorted(request)


def _sorted(value: object) -> object:
    if not isinstance(value, Mapping):
        return value
    return {key: _sorted(value[key]) for key in sorted(value, key=str)}


def _name(path: tuple[Any, ...]) -> str:
    """``the input``, ``input 0`` or ``input 'mask'``, with what is within it."""
    if not path:
        return "the input"
    head, *rest = path
    key = head.key if isinstance(head, pytree.MappingKey) else head.idx
    return f"input {key!r}{pytree.keystr(tuple(rest))}"


def _count(number: int) -> str:
    return "one value" if number == 1 else f"{number} values"
