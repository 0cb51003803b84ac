"""Whether a kernel that reads its weight reordered is faster than the plain one, by measurement.

What a shape took is kept in the user's cache folder, under a key of the shape, the machine and the
number of threads.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from graphopt.cache import JsonCache, fingerprint, is_duration

CACHE = JsonCache("kernels")
ROUNDS = 7
SECONDS = 0.05

Run = Callable[[], object]


def is_faster(what: str, make: Callable[[], tuple[Run, Run]]) -> bool:
    """Whether the packed kernel takes less time than the plain one.

    Args:
        what: both of them, with all shapes; the key under which the times are kept.
        make: the packed and the plain one, to be called several times.
    """
    key = fingerprint("packed", what)
    times = _kept(key)
    if times is None:
        times = _measured(make)
        CACHE.write(key, {"what": what, "packed": times[0], "plain": times[1]})
    packed, plain = times
    return packed < plain


def _kept(key: str) -> tuple[float, float] | None:
    match CACHE.read(key):
        case {"what": str(), "packed": packed, "plain": plain, **rest} if not rest:
            if is_duration(packed) and is_duration(plain):
                return packed, plain
    return None


def _measured(make: Callable[[], tuple[Run, Run]]) -> tuple[float, float]:
    # Somebody else may have interrupted a run, so the shortest one says what the kernel takes.
    with torch.no_grad(), _disable_current_modes():
        runs = make()
        for run in runs:
            run()
        best = [float("inf")] * 2
        start = time.perf_counter()
        for _ in range(ROUNDS):
            for index, run in enumerate(runs):
                begin = time.perf_counter()
                run()
                best[index] = min(best[index], time.perf_counter() - begin)
            if time.perf_counter() - start > SECONDS:
                break
    return best[0], best[1]


def sample(value: Tensor) -> Tensor:
    """A tensor of the same size and dtype with numbers of its own; no random stream is touched."""
    size = [int(n) for n in value.shape]
    generator = torch.Generator().manual_seed(0)
    return torch.rand(size, generator=generator).to(value.dtype)
