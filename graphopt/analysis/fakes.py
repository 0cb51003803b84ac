"""Operators on fake tensors with symbolic sizes, so that symbols stay symbols.

Some of torch's own kernels for that make a whole number of a symbol, or ask what concerns the
choice of a kernel only; the graph would then hold for that size, or for a few.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cache
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses import fake_impls

from graphopt.analysis.hints import at_hint

aten = torch.ops.aten

_RESAMPLING = (
    *(f"upsample_nearest{d}d" for d in (1, 2, 3)),
    *(f"_upsample_nearest_exact{d}d" for d in (1, 2, 3)),
    *("upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d", "upsample_bicubic2d"),
    *("_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"),
)
_CONVOLUTIONS = (
    aten.convolution.default,
    aten._convolution.default,
    aten.convolution_backward.default,
)


def keeping_symbols(values: Iterable[Any]) -> AbstractContextManager[None]:
    """Within, operators run on these fake values, or on what comes of them.

    Nothing is changed where none of them has a symbol.
    """
    return symbolic_kernels() if any(map(_has_symbol, values)) else nullcontext()


@contextmanager
def unasked(values: Iterable[Any]) -> Iterator[None]:
    """As `keeping_symbols`, for what is the same at every size, such as a dtype.

    Nothing that operators ask of a symbol becomes a condition of the graph.
    """
    known = list(values)
    symbol = next((s for s in map(_symbol, known) if s is not None), None)
    with ExitStack() as stack:
        stack.enter_context(keeping_symbols(known))
        if symbol is not None:
            stack.enter_context(symbol.node.shape_env.suppress_guards())
        yield


@contextmanager
def symbolic_kernels() -> Iterator[None]:
    """Within, operators keep symbols, where torch or this module knows how."""
    own = mock.patch.dict(fake_impls.get_fast_op_impls(), _kernels())
    with enable_python_dispatcher(), own:
        yield


def _has_symbol(value: Any) -> bool:
    return _symbol(value) is not None


def _symbol(value: Any) -> Any:
    if isinstance(value, Tensor):
        value = value.shape
    if isinstance(value, list | tuple):
        return next((s for s in map(_symbol, value) if s is not None), None)
    return value if isinstance(value, torch.SymInt) else None


@cache
def _kernels() -> dict[Any, Callable[..., Any]]:
    forwards = [getattr(aten, name).default for name in _RESAMPLING]
    backwards = [getattr(aten, f"{name}_backward").default for name in _RESAMPLING]
    return {
        **{op: _resampling(op, _forward_shape) for op in forwards},
        **{op: _resampling(op, _backward_shape) for op in backwards},
        **{op: _convolution(op) for op in _CONVOLUTIONS},
    }


def _forward_shape(source: Tensor, output_size: Sequence[Any], *_: Any, **__: Any) -> list[Any]:
    return [*source.shape[:2], *output_size]


def _backward_shape(
    gradient: Tensor, output_size: Sequence[Any], input_size: Sequence[Any], *_: Any, **__: Any
) -> list[Any]:
    return list(input_size)


def _resampling(operator: Any, shape_of: Callable[..., list[Any]]) -> Callable[..., Tensor]:
    """The result has the shape that its arguments say, and the layout of the captured call."""

    def kernel(mode: Any, source: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        with mode:
            dtype, device = source.dtype, source.device
            form = at_hint((source.shape, source.stride()))
            shape = shape_of(source, *args, **kwargs)
        example = torch.empty_strided(*form, dtype=dtype, device="meta")
        rest = at_hint((args, kwargs))
        layout = operator(example, *rest[0], **rest[1]).stride()
        strides: list[Any] = [1] * len(shape)
        step: Any = 1
        for dimension in sorted(range(len(shape)), key=lambda d: (layout[d], -d)):
            strides[dimension] = step
            step = step * shape[dimension]
        with mode:
            return torch.empty_strided(shape, strides, dtype=dtype, device=device)

    return kernel


def _convolution(operator: Any) -> Callable[..., Any]:
    """Which kernel runs depends on the size, and the layout of its result does not."""

    def kernel(mode: Any, *args: Any, **kwargs: Any) -> Any:
        with mode.shape_env.suppress_guards():
            return fake_impls.conv(mode, operator, *args, **kwargs)

    return kernel
