"""Bytes that a run has at once, as torch's allocator records them."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch


def most(run: Callable[[], object]) -> int:
    """The most that there is at once in a run on the CPU, beyond what there is before it."""
    gc.collect()
    gc.disable()  # what is freed later must not be freed in between
    try:
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
            run()
    finally:
        gc.enable()
    recorder: Any = profiler.profiler
    events = recorder.kineto_results.events()
    changes = [
        (e.start_ns(), i, e.nbytes()) for i, e in enumerate(events) if e.name() == "[memory]"
    ]
    now = peak = 0
    for *_, change in sorted(changes):
        now += change
        peak = max(peak, now)
    return peak
