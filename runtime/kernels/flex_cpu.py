"""The flex operators on CPUs, in C++ that PyTorch's code generator builds, once per machine.

Built and loaded at the first call of a process. Where that does not work, for want of a compiler or
of a folder to write to, the reference runs instead; no bit differs.
"""

from __future__ import annotations

import ctypes
import logging
import shutil
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from graphopt.ops import flex
from graphopt.runtime.kernels.flex_source import SOURCE
from graphopt.runtime.kernels.place import Place

log = logging.getLogger("graphopt")

# Below, waking a thread takes longer than the work.
_LEAST_PER_THREAD = 32768

_POINTER, _INT, _INT64 = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
_ROUNDING = [_POINTER, _POINTER, _INT64, _POINTER, _INT, _POINTER, _INT64, _INT, _POINTER]


@lru_cache(maxsize=1)
def library() -> Any:
    """The functions of `SOURCE`; `None` where they cannot be built."""
    from torch._inductor import config

    compilers = [c for c in config.cpp.cxx if c] or ["g++"]
    if not any(shutil.which(c) for c in compilers):
        log.warning("flex operators are slower without a C++ compiler: none of %s", compilers)
        return None
    # Code for other vector instructions in a shared cache folder must not be taken for this one.
    source = f"// {torch.backends.cpu.get_cpu_capability()}\n{SOURCE}"
    try:
        from torch._inductor.codecache import CppCodeCache

        built: Any = CppCodeCache.load(source)
        built.flex_quantise.argtypes = built.flex_round.argtypes = _ROUNDING
        built.flex_dequantise.argtypes = [_POINTER, _POINTER, _INT64, _POINTER, _INT]
        for function in (built.flex_quantise, built.flex_round, built.flex_dequantise):
            function.restype = None
    except Exception as error:  # Whatever a compiler, a linker or a file system comes up with.
        log.warning("flex operators run without C++, which is slower: %s", error)
        return None
    return built


def flex_quantise(
    x: Tensor,
    exponent: Tensor,
    mantissa: int,
    seed_use: int | None = None,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`graphopt.ops.flex.flex_quantise` in one pass."""
    built = library()
    if built is None:
        return flex.flex_quantise(x, exponent, mantissa, seed_use, seed)
    return _round(built.flex_quantise, torch.int16, x, exponent, mantissa, seed_use, seed)


def flex_round(
    x: Tensor,
    exponent: Tensor,
    mantissa: int,
    use: int | None = None,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`graphopt.ops.flex.flex_round` in one pass."""
    built = library()
    if built is None:
        return flex.flex_round(x, exponent, mantissa, use, seed)
    return _round(built.flex_round, torch.float32, x, exponent, mantissa, use, seed)


def flex_dequantise(mantissas: Tensor, exponent: Tensor) -> Tensor:
    """`graphopt.ops.flex.flex_dequantise` in one pass."""
    built = library()
    if built is None:
        return flex.flex_dequantise(mantissas, exponent)
    flex.check_mantissas(mantissas, exponent)
    place = Place.of(mantissas, torch.float32)
    built.flex_dequantise(
        place.source.data_ptr(), place.result.data_ptr(), place.source.numel(),
        exponent.data_ptr(), _threads(mantissas),
    )  # fmt: skip
    return place.finish()


def _round(
    function: Any,
    dtype: torch.dtype,
    x: Tensor,
    exponent: Tensor,
    mantissa: int,
    use: int | None,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    flex.check(x, exponent, mantissa, use, seed)
    place = Place.of(x, dtype, in_order=seed is not None)
    seed = None if seed is None else seed.contiguous()
    statistics = torch.empty(4, dtype=torch.int32)
    function(
        place.source.data_ptr(), place.result.data_ptr(), place.source.numel(),
        exponent.data_ptr(), mantissa, None if seed is None else seed.data_ptr(), use or 0,
        _threads(x), statistics.data_ptr(),
    )  # fmt: skip
    return place.finish(), statistics


def _threads(tensor: Tensor) -> int:
    return max(1, min(torch.get_num_threads(), tensor.numel() // _LEAST_PER_THREAD))
