"""Simulators of low precision that `benchmarks.quantise` compares with; none has to be installed.

`PEERS` has the usual call of each on a tensor, for its time. `EXACT_PEERS` has calls that should
round to multiples of 2^E with 16 bits, for the count of what they misround.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.harness import Run


def qpytorch(x: Tensor) -> Run:
    """Block floating point of 16 bits with one exponent, in float32, without statistics."""
    from qtorch.quant import block_quantize

    return lambda: block_quantize(x, wl=16, dim=-1, rounding="nearest")


def microxcaling(x: Tensor) -> Run:
    """MXINT8, its widest shared-exponent format, in blocks of 32, in float32."""
    from mx.mx_ops import _quantize_mx

    return lambda: _quantize_mx(x, 8, elem_format="int8", axes=[-1], block_size=32, round="even")


def torchao_mx(x: Tensor) -> Run:
    """MXFP8 in blocks of 32, as eight bits and scales."""
    from torchao.prototype.mx_formats.mx_tensor import to_mx

    return lambda: to_mx(x, torch.float8_e4m3fn, 32)


def torchao_mx_compiled(x: Tensor) -> Run:
    from torchao.prototype.mx_formats.mx_tensor import to_mx

    compiled = torch.compile(to_mx, dynamic=False)
    return lambda: compiled(x, torch.float8_e4m3fn, 32)


def torchao_int16(x: Tensor) -> Run:
    """An affine int16 with one scale and zero point 0, without statistics."""
    from torchao.quantization.quant_primitives import quantize_affine

    scale = torch.tensor(2.0**-12, device=x.device)
    zero = torch.tensor(0, dtype=torch.int32, device=x.device)
    shape = tuple(x.shape)
    return lambda: quantize_affine(x, shape, scale, zero, torch.int16, -32767, 32767)


PEERS: dict[str, Callable[[Tensor], Run]] = {
    "QPyTorch, block_quantize wl=16": qpytorch,
    "microxcaling, MXINT8": microxcaling,
    "torchao, to_mx float8_e4m3": torchao_mx,
    "torchao, to_mx float8_e4m3, compiled": torchao_mx_compiled,
    "torchao, quantize_affine int16": torchao_int16,
}


def graphopt(x: Tensor, e: int) -> Tensor:
    exponent = torch.tensor(e, dtype=torch.int32, device=x.device)
    return torch.ops.graphopt.flex_round(x, exponent, 16)[0]


def qpytorch_at(x: Tensor, e: int) -> Tensor:
    """It takes its unit from the largest magnitude, which is added: 1.5 * 2^(e + 14)."""
    from qtorch.quant import block_quantize

    anchor = torch.full((1,), 1.5 * 2.0 ** (e + 14), device=x.device)
    return block_quantize(torch.cat([x, anchor]), wl=16, dim=-1, rounding="nearest")[:-1]


def microxcaling_at(x: Tensor, e: int, rounding: str) -> Tensor:
    """The steps of its MXINT formats with 16 bits: divide, round, multiply."""
    from mx.elemwise_ops import _quantize_elemwise_core

    scale = 2 ** torch.tensor(float(e + 14))
    most = 32767 / 2**14
    rounded = _quantize_elemwise_core(x / scale, 16, 0, most, rounding, saturate_normals=True)
    return rounded * scale


def torchao_at(x: Tensor, e: int) -> Tensor:
    from torchao.quantization.quant_primitives import dequantize_affine, quantize_affine

    scale = torch.tensor(2.0**e, device=x.device)
    zero = torch.tensor(0, dtype=torch.int32, device=x.device)
    shape = tuple(x.shape)
    mantissas = quantize_affine(x, shape, scale, zero, torch.int16, -32767, 32767)
    return dequantize_affine(mantissas, shape, scale, zero, torch.int16, -32767, 32767)


EXACT_PEERS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "graphopt": graphopt,
    "QPyTorch, block_quantize wl=16": qpytorch_at,
    "microxcaling, 16 bits, round=nearest": lambda x, e: microxcaling_at(x, e, "nearest"),
    "microxcaling, 16 bits, round=even": lambda x, e: microxcaling_at(x, e, "even"),
    "torchao, quantize_affine int16": torchao_at,
}
