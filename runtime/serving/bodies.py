"""Requests and answers as JSON.

``{"inputs": ...}`` has what the example given to `serve` has, each tensor as nested lists, and
``{"outputs": ...}`` comes back. Numbers of float32 survive the way bit for bit; NaN and infinities
are written as Python's json does.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from graphopt.errors import RequestError
from graphopt.runtime.serving.batches import Form


class FromJson:
    """Reads ``{"inputs": ...}`` as a request.

    Args:
        form: of the requests; says what is a tensor, and of which dtype.
    """

    def __init__(self, form: Form) -> None:
        self._dtypes = dict(zip(form.names, form.dtypes, strict=True))
        self._device = form.device
        self._names = pytree.tree_unflatten(form.names, form.spec)

    def __call__(self, body: bytes) -> object:
        """The request in a body.

        Raises:
            RequestError: the body is another one.
        """
        try:
            inputs = json.loads(body)["inputs"]
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise RequestError('the body is not {"inputs": ...} in JSON') from error
        return self._read(self._names, inputs)

    def _read(self, names: Any, value: Any) -> Any:
        """A JSON value as what has these names in its places."""
        if isinstance(names, str):
            return self._tensor(names, value)
        if isinstance(names, dict):
            if not isinstance(value, dict) or value.keys() != names.keys():
                raise RequestError(f"the keys of an object must be {', '.join(map(repr, names))}")
            return {key: self._read(names[key], value[key]) for key in names}
        if not isinstance(value, list) or len(value) != len(names):
            raise RequestError(f"inputs must be a list of {len(names)}")
        return type(names)(self._read(n, v) for n, v in zip(names, value, strict=True))

    def _tensor(self, name: str, value: Any) -> Tensor:
        dtype = self._dtypes[name]
        try:
            if not dtype.is_floating_point and not torch.can_cast(torch.tensor(value).dtype, dtype):
                raise ValueError(f"its numbers are no {str(dtype).removeprefix('torch.')}")
            return torch.tensor(value, dtype=dtype, device=self._device)
        except (ValueError, TypeError, RuntimeError, OverflowError) as error:
            raise RequestError(f"{name} is no tensor: {error}") from error


def to_json(answer: object) -> bytes:
    """``{"outputs": ...}`` with one answer, each tensor as nested lists."""
    plain = pytree.tree_map(lambda x: x.tolist() if isinstance(x, Tensor) else x, answer)
    return json.dumps({"outputs": plain}).encode()
