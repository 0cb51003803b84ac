"""Ranks whose passes send nothing, where other ranks wait for them.

Such a rank waits for nobody, as its passes may well be those of all ranks. So it leaves a word, and
looks for an answer for a while; its next call raises if others have waited for it in vain.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore
from torch.distributed.distributed_c10d import _world

from graphopt.errors import RankError
from graphopt.runtime.ranks.store import Store, StoreLost

# Seconds between two looks for an answer, at first and at most.
PAUSE, LONGEST = 0.5, 2.5
HINT = "optimize with the same passes on all ranks"


def silences(group: dist.ProcessGroup, timeout: float) -> Store:
    """Where the silent ranks of a group leave their words."""
    return Store(PrefixStore("graphopt/silent", _world.pg_map[group][1]), timeout)


def announce(group: dist.ProcessGroup, spec: str, refuse: Callable[[RankError], None]) -> None:
    """Say that this rank's passes send nothing.

    Args:
        group: whose other ranks may wait.
        spec: the passes.
        refuse: called, from another thread, where ranks have waited for this one.
    """
    backend = group._get_backend(torch.device(group._device_types[0]))
    timeout = backend.options._timeout.total_seconds()
    store, rank = silences(group, timeout), group.rank()
    try:
        store.set(str(rank), spec)
    except StoreLost:
        return  # nobody can wait
    begun = time.monotonic()

    def look() -> None:
        while (gone := time.monotonic() - begun) < 2 * timeout + 10:
            try:
                if store.has(f"{rank}/refused"):
                    refuse(RankError(store.get(f"{rank}/refused"), hint=HINT))
                    store.set(f"{rank}/read", "read")
                    return
            except StoreLost:
                return
            time.sleep(min(PAUSE + gone / 20, LONGEST))

    threading.Thread(target=look, name="graphopt silent", daemon=True).start()


def refused(store: Store, absent: Sequence[int]) -> str:
    """What the silent of these ranks do, for the error; they are told, too."""
    silent = [rank for rank in absent if store.has(str(rank))]
    if not silent:
        return ""
    spec = store.get(str(silent[0]))
    for rank in silent:
        theirs = store.get(str(rank))
        text = f"the passes {theirs!r} of rank {rank} send nothing, and other ranks wait for it"
        store.set(f"{rank}/refused", text)
    end = time.monotonic() + 1.2 * LONGEST
    while time.monotonic() < end and not all(store.has(f"{rank}/read") for rank in silent):
        time.sleep(PAUSE / 5)
    return f"; the passes {spec!r} of rank {silent[0]} send nothing"
