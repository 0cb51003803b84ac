"""The kernels of flex tensors in Triton's interpreter against the reference, bit for bit.

A process of its own, as the interpreter is chosen when Triton is imported:
``TRITON_INTERPRET=1 python -m tests.support.interpreted_flex`` prints the cases that differ.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from graphopt.ops import flex as reference
from graphopt.ops import int16_mm as products
from graphopt.runtime.kernels import flex, int16_mm
from tests.support.flex import exponent, hard_bits

EXPONENTS = (reference.UNKNOWN, -126, 0, 1000)
SEED = torch.tensor([-5, 2**33 + 7])


def tensors(e: int, mantissa: int) -> dict[str, Tensor]:
    nearest = max(-126, min(126, e))
    lost = [math.nan, math.inf, -math.inf, 1e-42, -0.0, 3.4e38]
    return {
        "hard": torch.from_numpy(hard_bits(nearest, mantissa, 40).view(np.float32)),
        "transposed": torch.randn(7, 10).t(),
        "with gaps": torch.randn(6, 8)[::2, ::3],
        "zeros": -torch.zeros(5),
        "empty": torch.zeros(0, 3),
        "special": torch.tensor(lost),
        "lost": torch.tensor(lost[:2]),
    }


def same(found: Tensor, wanted: Tensor) -> bool:
    """Whether bits and strides are equal; +0 and -0 are not."""
    if found.dtype is torch.float32 and wanted.dtype is torch.float32:
        if found.stride() != wanted.stride():
            return False
        found, wanted = found.contiguous().view(torch.int32), wanted.contiguous().view(torch.int32)
    return found.dtype is wanted.dtype and torch.equal(found, wanted)


def roundings() -> Iterator[tuple[str, bool]]:
    for e in EXPONENTS:
        for mantissa in (8, 16):
            for name, x in tensors(e, mantissa).items():
                for random in ((), (3, SEED)):
                    arguments = (x, exponent(e), mantissa, *random)
                    for operator in ("flex_quantise", "flex_round"):
                        found = getattr(flex, operator)(*arguments)
                        wanted = getattr(reference, operator)(*arguments)
                        case = f"{operator} {name} {e} {mantissa} {len(random)}"
                        yield case, all(map(same, found, wanted))
                mantissas, _ = reference.flex_quantise(x, exponent(e), mantissa)
                values = flex.flex_dequantise(mantissas, exponent(e))
                wanted_values = reference.flex_dequantise(mantissas, exponent(e))
                yield f"flex_dequantise {name} {e} {mantissa}", same(values, wanted_values)


def matrix(*shape: int) -> Tensor:
    whole = torch.iinfo(torch.int16)
    return torch.randint(whole.min, whole.max + 1, shape, dtype=torch.int16)


def multiplications() -> Iterator[tuple[str, bool]]:
    shapes = [(3, 5, 4), (70, 130, 66), (1, 64, 1), (0, 3, 2), (3, 0, 2)]
    for m, k, n in shapes:
        a, b = matrix(m, k), matrix(n, k).t()
        wanted = products.int16_mm(a, b)
        for tile in (32, 64):
            int16_mm.TILE = tile
            for parts, chunk in ((None, int16_mm.EXACT_IN_INT32), (3, 64), (2, 128)):
                found = int16_mm.int16_mm(a, b, parts=parts, chunk=chunk)
                yield f"{m} x {k} x {n}, {tile}, {parts}, {chunk}", same(found, wanted)
    # More terms than int32 holds sums of, all of the same sign.
    values = torch.tensor([-(2**15), 2**15 - 1, 128], dtype=torch.int16)
    found = int16_mm.int16_mm(values[:, None].repeat(1, 66_000), values.repeat(66_000, 1))
    yield "long sums", same(found, 66_000 * values[:, None].long() * values.long())


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.manual_seed(0)
    flex.BLOCK = 256
    cases = [*roundings(), *multiplications()]
    print(json.dumps([len(cases), [name for name, is_same in cases if not is_same]]))
