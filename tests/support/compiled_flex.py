"""Compiles the kernels of flex tensors for a GPU that need not be there; prints instructions.

A process of its own, as in `tests.support.compiled_kernels`: ``python -m
tests.support.compiled_flex`` prints the PTX instructions of each kernel for sm_90 as JSON.
"""

from __future__ import annotations

import json
import re
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from graphopt.runtime.kernels import flex, int16_mm

TYPES = {
    **{"x": "*fp32", "mantissas": "*i16", "exponent": "*i32", "statistics": "*i32"},
    **{"seed": "*i64", "left": "*i8", "right": "*i8"},
}


def instructions(kernel: Any, out: str, constants: dict[str, Any]) -> list[str]:
    """Names of the PTX instructions of a kernel for sm_90, without repetition."""
    types = {**TYPES, "out": out}
    signature = {
        name: "constexpr" if name in constants else types.get(name, "i32")
        for name in kernel.arg_names
    }
    # What the launcher finds out about pointers and sizes that are multiples of 16.
    attributes = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(kernel.arg_names)
        if name not in constants and name not in ("exponent", "use", "seed")
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})
    assert made.asm["cubin"]
    return sorted(set(re.findall(r"^\s+(?:@%p\d+ )?([a-z][\w.]+)", made.asm["ptx"], re.M)))


if __name__ == "__main__":
    block = {"BLOCK": flex.BLOCK}
    found = {
        "amax": instructions(flex.amax_kernel, "", block),
        "dequantise": instructions(flex.dequantise_kernel, "*fp32", block),
    }
    for to_values in (False, True):
        for stochastic in (False, True):
            constants = {"TO_VALUES": to_values, "STOCHASTIC": stochastic, "MANTISSA": 16, **block}
            name = f"{'round' if to_values else 'quantise'}{' stochastic' * stochastic}"
            out = "*fp32" if to_values else "*i16"
            found[name] = instructions(flex.rounding_kernel, out, constants)
    sizes = {"CHUNK": int16_mm.EXACT_IN_INT32, "TILE": int16_mm.TILE, "STEP": int16_mm.STEP}
    found["product"] = instructions(int16_mm.product_kernel, "*i64", sizes)
    print(json.dumps(found))
