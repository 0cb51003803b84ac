"""Exact products of int16 matrices.

    int16_mm(Tensor a, Tensor b) -> Tensor

``[m, k] x [k, n] -> int64 [m, n]``, over the full range of int16. A sum of integers does not depend
on its order, so neither do the results on tiles, threads or devices.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graphopt.errors import ArgumentError

# So many products of at most 2^30 stay within the 2^53 up to which float64 holds every integer.
EXACT_IN_DOUBLE = 2**23

# Typed `Any` because torch leaves the methods of `Library` untyped.
_library: Any = torch.library.Library("graphopt", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("int16_mm(Tensor a, Tensor b) -> Tensor")


def check(a: Tensor, b: Tensor) -> None:
    """Raise `ArgumentError` unless `a` and `b` are int16 matrices that can be multiplied."""
    if a.dtype is not torch.int16 or b.dtype is not torch.int16:
        raise ArgumentError(
            f"int16_mm multiplies int16, not {a.dtype} with {b.dtype}",
            hint="quantise both by graphopt::flex_quantise",
        )
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[0] or a.device != b.device:
        raise ArgumentError(
            f"int16_mm cannot multiply {tuple(a.shape)} on {a.device} "
            f"with {tuple(b.shape)} on {b.device}",
            hint="pass [m, k] and [k, n] on one device",
        )


def int16_mm(a: Tensor, b: Tensor) -> Tensor:
    """The reference of `graphopt::int16_mm`: float64 products, which are exact up to 2^23 terms."""
    check(a, b)
    out = torch.zeros(a.shape[0], b.shape[1], dtype=torch.int64, device=a.device)
    for start in range(0, a.shape[1], EXACT_IN_DOUBLE):
        part = slice(start, start + EXACT_IN_DOUBLE)
        out += (a[:, part].double() @ b[part].double()).to(torch.int64)
    return out


def _fake(a: Tensor, b: Tensor) -> Tensor:
    check(a, b)
    return a.new_empty(a.shape[0], b.shape[1], dtype=torch.int64)


# One kernel for every device; `graphopt.runtime.kernels` brings a faster one for CUDA.
_library.impl("int16_mm", int16_mm, "CompositeExplicitAutograd")
torch.library.register_fake("graphopt::int16_mm", _fake, lib=_library)
