"""Products of float8 matrices with their scales.

    scaled_mm(Tensor a, Tensor a_scale, Tensor b, Tensor b_scale) -> Tensor

`a` is [m, k] and `b` is [k, n], with the scales of `graphopt.ops.float8` (float32) or of
`graphopt.ops.mx` (E8M0) along k; the result is float32. Where a device multiplies such matrices
itself it does; elsewhere both are read back and multiplied in float32, which is the definition. The
two differ by the order of their sums and by what the device keeps of them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from graphopt.errors import ArgumentError
from graphopt.ops.mx import BLOCK
from graphopt.ops.unrounded import declare

# Compute capability from which NVIDIA's GPUs multiply matrices with scales of this type.
CAPABILITIES = {torch.float32: (8, 9), torch.float8_e8m0fnu: (10, 0)}

# Typed `Any` because torch leaves the methods of `Library` untyped.
_library: Any = torch.library.Library("graphopt", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("scaled_mm(Tensor a, Tensor a_scale, Tensor b, Tensor b_scale) -> Tensor")


def has_scaled_mm(device: torch.device, scales: torch.dtype) -> bool:
    """Whether a device itself multiplies float8 matrices with scales of this type."""
    if device.type != "cuda" or torch.version.hip is not None or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability(device) >= CAPABILITIES[scales]


def emulated(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor) -> Tensor:
    """The definition: both factors in float32."""
    _check(a, b)
    return _read(a, a_scale, 1) @ _read(b, b_scale, 0)


def native(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor) -> Tensor:
    """By torch's product with scales, which wants k and n in sixteens and the columns of b."""
    _check(a, b)
    if not a.numel() or not b.numel() or a.dtype is b.dtype is torch.float8_e5m2:
        return emulated(a, a_scale, b, b_scale)
    columns = b.shape[1]
    step = BLOCK if a_scale.dtype is torch.float8_e8m0fnu else 16
    a, b = _padded(a, 1, step), _padded(b.t(), step, step).t()
    if a_scale.dtype is torch.float8_e8m0fnu:
        blocks, swizzle = F.ScalingType.BlockWise1x32, F.SwizzleType.SWIZZLE_32_4_4
        scales = [swizzled(s.contiguous()) for s in (a_scale, b_scale.t())]
        product = F.scaled_mm(
            a, b, scales[0], blocks, scales[1], blocks, swizzle, swizzle, None, torch.float32
        )
        return product[:, :columns]
    per_tensor = a_scale.dim() == 0
    one = a_scale.new_ones(())
    factors = (a_scale.reciprocal(), b_scale.reciprocal()) if per_tensor else (one, one)
    product = torch._scaled_mm(a, b, *factors, out_dtype=torch.float32)[:, :columns]
    # Scales of rows are applied to the sums: with them torch returns bfloat16 only.
    return product if per_tensor else product / a_scale / b_scale


def swizzled(scales: Tensor) -> Tensor:
    """Scales [rows, blocks] in the order in which tensor cores read them, flat.

    Tiles of 128 rows and 4 blocks lie one after the other; in a tile, row r and block c are at
    ``16 (r mod 32) + 4 (r // 32) + c``. What is missing at the edges is 2^-127, times zeros.

    Source: "block scaling factors layout" in NVIDIA's documentation of cuBLAS.
    """
    rows, blocks = scales.shape
    whole = F.pad(scales.view(torch.uint8), (0, -blocks % 4, 0, -rows % 128))
    tiles = whole.view(-1, 4, 32, whole.shape[1] // 4, 4).permute(0, 3, 2, 1, 4)
    return tiles.reshape(-1).view(torch.float8_e8m0fnu)


def _read(values: Tensor, scale: Tensor, axis: int) -> Tensor:
    blocks = scale.dtype is torch.float8_e8m0fnu
    wide: Tensor = (
        torch.ops.graphopt.mx_dequantise(values, scale, axis)
        if blocks
        else torch.ops.graphopt.float8_dequantise(values, scale)
    )
    return wide


def _padded(matrix: Tensor, rows: int, columns: int) -> Tensor:
    """Contiguous, with zeros up to multiples."""
    missing = (0, -matrix.shape[1] % columns, 0, -matrix.shape[0] % rows)
    whole = F.pad(matrix.contiguous().view(torch.uint8), missing)
    return whole.contiguous().view(matrix.dtype)


def _product(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor) -> Tensor:
    here = has_scaled_mm(a.device, a_scale.dtype)
    return (native if here else emulated)(a, a_scale, b, b_scale).contiguous()


def _check(a: Tensor, b: Tensor) -> None:
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[0]:
        raise ArgumentError(
            f"shapes {tuple(a.shape)} and {tuple(b.shape)} do not multiply",
            hint="pass [m, k] and [k, n]",
        )


def _fake(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor) -> Tensor:
    _check(a, b)
    return a.new_empty((a.shape[0], b.shape[1]), dtype=torch.float32)


def _unrounded(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor) -> Tensor:
    return a @ b


_library.impl("scaled_mm", _product, "CompositeExplicitAutograd")
torch.library.register_fake("graphopt::scaled_mm", _fake, lib=_library)
declare({"scaled_mm": _unrounded})
