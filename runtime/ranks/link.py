"""How long an all-reduce takes on this job's own link, by its size."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch

from graphopt.network.curve import Curve, fit

# Bytes of the messages that are timed.
SIZES = (1 << 10, 1 << 14, 1 << 17, 1 << 20, 1 << 22, 1 << 24, 1 << 25)
# A backward sends its messages back to back. A small one on its own finds an idle link, which may
# let a burst through, and nothing fills the pauses between its phases; so trains of this many are
# timed. A large one is often the last, with nothing behind it to fill its pauses.
TRAIN = 4
LONGEST = 1 << 24
# Time limit for all of it; a slow link gets fewer repetitions.
SECONDS = 3.0
# Gradients of 4 MiB that are copied into one buffer.
JOINED = 4
REPETITIONS = 5


def measure_link(group: Any, device: torch.device) -> Curve:
    """Median seconds of an all-reduce in a train, for a few sizes; call it on all ranks at once."""
    samples: list[tuple[float, float]] = []
    begin = time.perf_counter()
    for size in SIZES:
        train = [torch.zeros(size // 4, device=device) for _ in range(_length(size))]
        _timed(group, train)
        repetitions = torch.tensor([REPETITIONS])
        if time.perf_counter() - begin > SECONDS / 2:
            repetitions = torch.tensor([1])
        # The slowest rank decides how often, so that all send equally many messages.
        group.allreduce([repetitions], _minimum()).wait()
        for _ in range(int(repetitions)):
            samples.append((float(size), _timed(group, train)))
    curve = fit(samples, f"measured on {group.size()} ranks")
    return replace(curve, joining=_joining(device))


def _joining(device: torch.device) -> float:
    """Seconds per byte for copying gradients into one buffer, newly allocated each time.

    Part of the cost of a message, which cannot start before.
    """
    parts = [torch.zeros(1 << 20, device=device) for _ in range(JOINED)]
    times = []
    for _ in range(REPETITIONS):
        start = time.perf_counter()
        joined = torch.cat(parts)
        if joined.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
        del joined
    return sorted(times)[len(times) // 2] / (4 * JOINED * (1 << 20))


def _minimum() -> Any:
    options = torch.distributed.AllreduceOptions()
    options.reduceOp = torch.distributed.ReduceOp.MIN  # type: ignore[assignment]
    return options


def _length(size: int) -> int:
    return max(1, min(TRAIN, LONGEST // size))


def _timed(group: Any, train: list[torch.Tensor]) -> float:
    """Seconds per message of a train."""
    start = time.perf_counter()
    for work in [group.allreduce([message]) for message in train]:
        work.wait()
    if train[0].is_cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / len(train)
