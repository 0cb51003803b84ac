"""`graphopt::fused_convolution`: a convolution and what is done to each of its results.

    fused_convolution(Tensor x, Tensor weight, Tensor? bias, int[] stride, int[] padding,
                      int[] dilation, int groups, Tensor? other, str post, float[] scalars,
                      str algorithm) -> Tensor

``y = post(conv2d(x, weight, bias) + other)`` where `other` (shape of ``y``) may be absent, and
`post` is a key of `POSTS`. It says what one oneDNN kernel can do; what runs in its place is such a
kernel with a weight in oneDNN's own layout (`graphopt.runtime.frozen.packing`). Inference only:
there is no backward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Typed `Any` because torch leaves the methods of `Library` untyped.
_library: Any = torch.library.Library("graphopt", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(
    "fused_convolution(Tensor x, Tensor weight, Tensor? bias, int[] stride, int[] padding, "
    "int[] dilation, int groups, Tensor? other, str post, float[] scalars, str algorithm) -> Tensor"
)

POSTS: Mapping[str, Callable[[Tensor, list[float], str], Tensor]] = MappingProxyType(
    {
        "none": lambda y, _, __: y,
        "relu": lambda y, _, __: y.relu(),
        "sigmoid": lambda y, _, __: y.sigmoid(),
        "tanh": lambda y, _, __: y.tanh(),
        "hardswish": lambda y, _, __: F.hardswish(y),
        "hardsigmoid": lambda y, _, __: F.hardsigmoid(y),
        "swish": lambda y, _, __: F.silu(y),
        "hardtanh": lambda y, limits, _: F.hardtanh(y, limits[0], limits[1]),
        "leaky_relu": lambda y, slope, _: F.leaky_relu(y, slope[0]),
        "gelu": lambda y, _, algorithm: F.gelu(y, approximate=algorithm),
    }
)
"""What can be done to each result, under oneDNN's names."""


def reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    other: Tensor | None,
    post: str,
    scalars: list[float],
    algorithm: str,
) -> Tensor:
    """What the operator means, in PyTorch's own operators."""
    y = torch.conv2d(x, weight, bias, stride, padding, dilation, groups)
    y = y if other is None else y + other
    return POSTS[post](y, scalars, algorithm)


_library.impl("fused_convolution", reference, "CPU")
torch.library.register_fake("graphopt::fused_convolution", reference, lib=_library)
