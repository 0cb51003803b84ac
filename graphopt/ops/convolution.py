"""`graphopt::packed_convolution`: a convolution with frozen weights, as one CPU kernel.

    packed_convolution(Tensor x, Tensor weight, Tensor? bias, int[] stride, int[] padding,
                       int[] dilation, int groups, Tensor? other, bool relu) -> Tensor

``y = f(conv2d(x, weight, bias) + other)`` with `f` the ReLU or the identity; `other` (shape of `y`)
may be absent. All float32 on the CPU, `x` of shape (n, c, h, w); the result is channels-last. The
weight is reordered into oneDNN's blocked layout at the first call and the reordered copy is kept
with the weight tensor, so the caller must pass a new tensor object whenever its values change;
`graphopt.runtime.frozen.prologue` does. Inference only: there is no backward.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

# Typed `Any` because torch leaves the methods of `Library` untyped.
_library: Any = torch.library.Library("graphopt", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(
    "packed_convolution(Tensor x, Tensor weight, Tensor? bias, int[] stride, int[] padding, "
    "int[] dilation, int groups, Tensor? other, bool relu) -> Tensor"
)

_KEY = "_graphopt_packed"


def available() -> bool:
    """Whether this build of PyTorch has the kernels."""
    return bool(torch._C._has_mkldnn) and hasattr(torch.ops.mkldnn, "_convolution_pointwise")


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    other: Tensor | None,
    relu: bool,
) -> Tensor:
    """What the operator means, in PyTorch's own operators."""
    y = torch.conv2d(x, weight, bias, stride, padding, dilation, groups)
    y = y if other is None else y + other
    y = y.relu() if relu else y
    return y.contiguous(memory_format=torch.channels_last)


def _cpu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    other: Tensor | None,
    relu: bool,
) -> Tensor:
    kernels = torch.ops.mkldnn._convolution_pointwise
    packed = getattr(weight, _KEY, None)
    if packed is None:
        packed = torch.ops.mkldnn._reorder_convolution_weight(
            weight, padding, stride, dilation, groups, list(x.shape)
        )
        setattr(weight, _KEY, packed)
    x = x.contiguous(memory_format=torch.channels_last)
    if other is None:
        after: tuple[Any, ...] = ("relu" if relu else "none", [], "")
        y = kernels(x, packed, bias, padding, stride, dilation, groups, *after)
    else:
        other = other.contiguous(memory_format=torch.channels_last)
        sums: tuple[Any, ...] = ("add", 1.0, "relu" if relu else None, [], None)
        y = kernels.binary(x, other, packed, bias, padding, stride, dilation, groups, *sums)
    return cast("Tensor", y)


_library.impl("packed_convolution", _cpu, "CPU")
torch.library.register_fake("graphopt::packed_convolution", reference, lib=_library)
