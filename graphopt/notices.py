"""What users are told while something runs: warnings at their own line, and what takes long.

``GRAPHOPT_LOG=quiet`` turns lines about what takes long off; warnings have Python's own filters.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Seconds after which it is said what is under way.
PATIENCE = 2.0

# Modules whose lines say nothing to a user: ours, PyTorch's, and what Python itself puts between.
_BETWEEN = frozenset(("graphopt", "torch", "contextlib", "functools", "threading"))


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the user's line that has led here, whatever lies in between."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and _between(frame.f_globals.get("__name__", "")):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


def _between(module: object) -> bool:
    return str(module).partition(".")[0] in _BETWEEN


def quiet() -> bool:
    """Whether the user wants no lines about what takes long."""
    return os.environ.get("GRAPHOPT_LOG", "").lower() == "quiet"


@contextmanager
def telling(what: str, why: str) -> Iterator[None]:
    """Run something; if it takes longer than `PATIENCE`, say so on stderr, and how long it took.

    Args:
        what: is done, as in "capturing Net".
        why: it has to be.
    """
    if quiet() or not _first_rank():
        yield
        return
    with if_long(
        PATIENCE,
        lambda: _line(f"{what}: {why} …"),
        lambda seconds: _line(f"{what} took {seconds:.1f} s"),
    ):
        yield


@contextmanager
def if_long(
    patience: float, begun: Callable[[], None], ended: Callable[[float], None]
) -> Iterator[None]:
    """Run something; tell of it only if it takes longer than `patience` seconds.

    Args:
        patience: until then it is not mentioned.
        begun: called from another thread once it takes longer.
        ended: called in the end, after `begun`, with the seconds that it took.
    """
    said = threading.Event()

    def tell() -> None:
        said.set()
        begun()

    timer = threading.Timer(patience, tell)
    timer.daemon = True
    start = time.perf_counter()
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
        if said.is_set():
            ended(time.perf_counter() - start)


def _line(text: str) -> None:
    sys.stderr.write(f"graphopt: {text}\n")
    sys.stderr.flush()


def _first_rank() -> bool:
    """All ranks of a job do the same; one of them says so."""
    distributed = sys.modules.get("torch.distributed")
    ready = distributed is not None and distributed.is_available()
    if distributed is None or not ready or not distributed.is_initialized():
        return True
    return bool(distributed.get_rank() == 0)
