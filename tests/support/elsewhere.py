"""A second device for machines without one: memory of the CPU that says it is on the meta device.

Under `Watch`, an operation on a tensor from here and one from elsewhere is refused as CUDA refuses
it: except for indices, scalars and copies.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("meta")
_aten = torch.ops.aten
_MEETING = (_aten.index, _aten.index_put, _aten.index_put_, _aten.copy_, _aten._to_copy)


class _Elsewhere(Tensor):
    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> _Elsewhere:
        make = cast(Any, Tensor)._make_wrapper_subclass
        found: _Elsewhere = make(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
            requires_grad=inner.requires_grad,
        )
        found.inner = inner
        return found

    def tolist(self) -> Any:
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(
        cls,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        return _run(func, args, kwargs or {})


class Watch(TorchDispatchMode):
    """Makes `DEVICE` a device that computes."""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    away = {id(t.inner): t for t in given if isinstance(t, _Elsewhere)}
    device = kwargs.get("device")
    if away and func.overloadpacket not in _MEETING:
        here = [t for t in given if t.dim() and not isinstance(t, _Elsewhere)]
        if here:
            raise RuntimeError(f"{func} of tensors on {DEVICE} and on {here[0].device}")
    to_elsewhere = device is not None and torch.device(device) == DEVICE
    if to_elsewhere:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    found = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))
    stays = bool(away) and device is None and not _writes_here(func, args)
    if not (to_elsewhere or stays):
        return found

    def wrapped(value: object) -> object:
        if not isinstance(value, Tensor):
            return value
        return away[id(value)] if id(value) in away else _Elsewhere(value)

    return tree_map(wrapped, found)


def _writes_here(func: Any, args: tuple[Any, ...]) -> bool:
    into = func.overloadpacket in (_aten.copy_, _aten.index_put_)
    return into and not isinstance(args[0], _Elsewhere)


_inner: Callable[[object], object] = lambda value: (  # noqa: E731
    value.inner if isinstance(value, _Elsewhere) else value
)
