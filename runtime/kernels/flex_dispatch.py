"""Which kernels run the flex operators on which device."""

from __future__ import annotations

import importlib.util
from types import ModuleType
from typing import Any

import torch

from graphopt.runtime.kernels import flex_cpu

_kept: list[Any] = []


def register() -> None:
    """Registers the kernels; torch raises when it is called twice in a process."""
    _register("CPU", flex_cpu)
    if importlib.util.find_spec("triton") is not None:
        from graphopt.runtime.kernels import flex, int16_mm

        _register("CUDA", flex)
        _kept[-1].impl("int16_mm", int16_mm.int16_mm)


def _register(key: str, kernels: ModuleType) -> None:
    library: Any = torch.library.Library("graphopt", "IMPL", key)  # type: ignore[no-untyped-call]
    for name in ("flex_quantise", "flex_dequantise", "flex_round"):
        library.impl(name, getattr(kernels, name))
    _kept.append(library)  # The registration lasts as long as the library object.
