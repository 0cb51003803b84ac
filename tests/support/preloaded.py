"""What the server that ranks are forked from has imported; none of it may start a thread."""

from __future__ import annotations

import gc
import pkgutil
from importlib import import_module

import graphopt

OTHERS = (
    "hypothesis",
    "pytest",
    "tests.support.models",
    "tests.support.ranks",
    "torch._dynamo.backends.common",
    "torch._dynamo.backends.debugging",
    "torch._dynamo.backends.distributed",
    "torch._dynamo.backends.inductor",
    "torch._inductor.choices",
    "torch._inductor.codegen.wrapper_fxir",
    "torch._inductor.compile_fx",
    "torch._inductor.fx_passes.fuse_attention",
    "torch._inductor.fx_passes.pad_mm",
    "torch._inductor.runtime.caching",
    "torch.distributed.tensor.experimental",
    "torch.export._trace",
    "torch.utils.cpp_extension",
)
NOT_IN_RANKS = ("graphopt.__main__", "graphopt.cli", "graphopt.render", "graphopt.testing")

for found in pkgutil.walk_packages(graphopt.__path__, "graphopt."):
    if not found.name.startswith(NOT_IN_RANKS):
        import_module(found.name)
for name in OTHERS:
    import_module(name)

# Which vector instructions there are: Inductor compiles and runs a program to know.
import_module("torch._inductor.cpu_vec_isa").pick_vec_isa()

# Ranks need not look through all this for garbage, nor copy its pages when they do.
gc.freeze()
