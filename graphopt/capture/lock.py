"""One capture at a time: Dynamo and AOTAutograd patch the process while they trace."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from torch._dynamo.convert_frame import compile_lock

_lock = threading.RLock()
_active = threading.local()


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """Within, no other thread makes a specialisation: capture, passes, trials, backends."""
    with _lock:
        yield


@contextmanager
def tracing_alone() -> Iterator[None]:
    """Within, no other thread traces, be it for graphopt or for torch.compile.

    What tracing logs about a call that it refuses is left out; the refusal says it.
    """
    fake = logging.getLogger("torch._subclasses.fake_tensor")
    with compile_lock:
        before, fake.disabled = fake.disabled, True
        outer, _active.now = is_tracing(), True
        try:
            yield
        finally:
            fake.disabled, _active.now = before, outer


def is_tracing() -> bool:
    """Whether this thread traces a model for graphopt now."""
    return bool(getattr(_active, "now", False))
