"""The elements of small constants: written so that reading gives the same bits."""

from __future__ import annotations

import torch
from torch import Tensor

from graphopt.text.syntax import TensorType

MOST_INLINED = 16  # elements; larger constants are held by reference

_NUMBERS = frozenset({
    torch.float64, torch.float32, torch.float16, torch.bfloat16,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
})  # fmt: skip

Elements = tuple[bool | int | float, ...] | bytes


def inlined(tensor: Tensor, most: int = MOST_INLINED) -> Elements | None:
    """The elements to write; ``None`` for a tensor that a text holds by reference.

    That are those with more elements than `most`, and those that are not plain and dense.

    Numbers where they give the same bits back, else the bytes (as for a NaN with a payload).
    """
    plain = type(tensor) in (Tensor, torch.nn.Parameter, torch.nn.Buffer)
    if not plain or tensor.numel() > most or tensor.device.type != "cpu":
        return None
    if tensor.layout is not torch.strided or tensor.is_quantized or not _is_dense(tensor):
        return None
    if tensor.dtype in _NUMBERS:
        values = tuple(_as_written(value) for value in tensor.detach().flatten().tolist())
        if elements_of(torch.tensor(values, dtype=tensor.dtype)) == elements_of(tensor):
            return values
    return elements_of(tensor)


def _as_written(value: bool | int | float) -> bool | int | float:
    """The number that its text means: a NaN loses sign and payload."""
    return float(repr(value)) if isinstance(value, float) else value


def restored(type_: TensorType, elements: Elements) -> Tensor:
    """The tensor that was written; raises ``ValueError`` for elements that do not fit the type."""
    shape = tuple(size for size in type_.shape if isinstance(size, int))
    stride = tuple(size for size in type_.stride if isinstance(size, int))
    if len(shape) < len(type_.shape) or len(stride) < len(shape):
        raise ValueError("a constant has no symbolic sizes")
    count = 1
    for size in shape:
        count *= size
    if isinstance(elements, bytes):
        if len(elements) != count * type_.dtype.itemsize:
            raise ValueError(f"{len(elements)} bytes for {count} elements")
        flat = torch.tensor(list(elements), dtype=torch.uint8).view(type_.dtype)
    else:
        if len(elements) != count:
            raise ValueError(f"{len(elements)} values for {count} elements")
        allowed = _python_types(type_.dtype)
        if wrong := [v for v in elements if type(v) not in allowed]:
            raise ValueError(f"{wrong[0]!r} is not an element of this type")
        try:
            flat = torch.tensor(elements, dtype=type_.dtype)
        except (RuntimeError, OverflowError) as error:
            raise ValueError("a value does not fit this type") from error
    result = torch.empty_strided(shape, stride, dtype=type_.dtype)
    return result.copy_(flat.view(shape))


def _python_types(dtype: torch.dtype) -> tuple[type, ...]:
    if dtype is torch.bool:
        return (bool,)
    return (int, float) if dtype.is_floating_point else (int,)


def elements_of(tensor: Tensor) -> bytes:
    """The bytes of all elements, in row-major order."""
    flat = tensor.detach().resolve_conj().resolve_neg().contiguous().flatten()
    return bytes(flat.view(torch.uint8).tolist())


def _is_dense(tensor: Tensor) -> bool:
    """Whether every element has its own place in memory and there are no gaps."""
    strides = tensor.stride()
    order = sorted(range(tensor.dim()), key=lambda d: (-strides[d], tensor.shape[d] == 1))
    return tensor.permute(order).is_contiguous()
