"""Compiles the kernels for a GPU that need not be there; prints their instructions as JSON.

A process of its own, as a kernel cannot be compiled where Triton's interpreter is chosen:
``python -m tests.support.compiled_kernels``.
"""

from __future__ import annotations

import json
import re
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from graphopt.runtime.kernels.shift import correlation_kernel
from graphopt.runtime.kernels.syrk import syrk_kernel

POINTERS = {"rows", "plane", "out"}
FLOATS = {"scale"}


def instructions(kernel: Any, dtype: str, constants: dict[str, Any]) -> list[str]:
    """Names of the PTX instructions of a kernel for sm_90, without repetition."""
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in POINTERS:
            signature[name] = f"*{dtype if name in ('rows', 'plane') else 'fp32'}"
        else:
            signature[name] = "fp32" if name in FLOATS else "i32"
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32))
    assert made.asm["cubin"]
    return sorted(set(re.findall(r"^\s+(?:@%p\d+ )?([a-z][\w.]+)", made.asm["ptx"], re.M)))


if __name__ == "__main__":
    found = {}
    for dtype in ("fp32", "bf16"):
        constants = {"ONES": True, "TILE": 64, "STEP": 32}
        found[f"syrk {dtype}"] = instructions(syrk_kernel, dtype, constants)
        for tile in (16, 64):
            constants = {"KERNEL1": 3, "KERNEL2": 1, "TILE": tile, "STEP": 32}
            found[f"shift {dtype} {tile}"] = instructions(correlation_kernel, dtype, constants)
    print(json.dumps(found))
