"""Triton kernels for the moments of K-FAC, behind the `graphopt::` operators.

Optional: the operators run everywhere without them. `register` makes them faster on CUDA devices.
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
