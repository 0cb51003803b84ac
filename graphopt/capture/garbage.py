"""Garbage is not looked for while graphs are made."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def keeping_garbage() -> Iterator[None]:
    """Within, nothing is collected: many small objects are made, and nearly all of them live."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
