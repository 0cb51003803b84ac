"""Kernels behind the `graphopt::` operators: Triton for GPUs, C++ for flex tensors on CPUs.

Optional: the operators run everywhere without them. `register` makes the moments of K-FAC faster on
CUDA devices, `register_flex` flex tensors and their products on CPUs and CUDA devices.
"""

from __future__ import annotations

import importlib.util
from functools import lru_cache


@lru_cache(maxsize=1)
def register() -> bool:
    """Makes the kernels the CUDA implementation of the operators; once per process.

    Returns:
        Whether Triton is installed.
    """
    if importlib.util.find_spec("triton") is None:
        return False
    from graphopt.runtime.kernels import dispatch

    dispatch.register()
    return True


@lru_cache(maxsize=1)
def register_flex() -> None:
    """Makes the kernels the implementation of the flex operators; once per process.

    Triton's are left out where it is not installed. What runs on CPUs is built at its first call.
    """
    from graphopt.runtime.kernels import flex_dispatch

    flex_dispatch.register()
