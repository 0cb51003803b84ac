"""Nothing that can be counted grows over the steps of a job: objects, keys, threads, calls."""

from __future__ import annotations

import gc
import os
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import graphopt
from tests.support.ranks import on_ranks

pytestmark = [pytest.mark.distributed]

# With all that is done in every eighth step only, for three sizes of batches.
ROUND = 24


def _keys() -> int:
    """How many texts the job's store has."""
    store: Any = dist.distributed_c10d._get_default_store()
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    return int(store.num_keys())


class _Counted:
    """A job of two ranks, whose steps are counted.

    Attributes:
        leaks: whether each step leaves something behind.
    """

    def __init__(self) -> None:
        torch.manual_seed(0)
        layers = [nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 4)]
        self.model = nn.Sequential(*layers)
        graphopt.optimize(self.model, backend="eager")
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.01, momentum=0.9)
        self.left: list[list[int]] = []
        self.leaks = False

    def steps(self, count: int) -> None:
        """Train."""
        for number in range(count):
            x = torch.randn(8 + 4 * (number % 3), 16)
            self.optimizer.zero_grad()
            (self.model(x) - x[:, :4]).square().mean().backward()
            self.optimizer.step()
            if self.leaks:
                self.left.append([number])
                for before in self.left:
                    before.count(number)

    def calls(self) -> Counter[str]:
        """How often each function is called in a round."""
        found: Counter[str] = Counter()

        def count(frame: Any, event: str, argument: object) -> None:
            if event == "call":
                found[frame.f_code.co_qualname] += 1
            elif event == "c_call":
                found[getattr(argument, "__qualname__", "?")] += 1

        sys.setprofile(count)
        try:
            self.steps(ROUND)
        finally:
            sys.setprofile(None)
        return found

    def look(self) -> dict[str, Any]:
        """What there is after a round."""
        calls = self.calls()
        gc.collect()
        kinds = Counter(type(value).__name__ for value in gc.get_objects())
        dist.barrier()
        return {
            "calls": calls,
            # What a look itself has made is in both.
            "objects": {k: n for k, n in kinds.items() if k not in ("Counter", "frame")},
            "keys": _keys(),
            "descriptors": len(os.listdir("/proc/self/fd")),
            "threads": threading.active_count(),
        }


def _grown(job: _Counted) -> tuple[dict[str, int], set[str]]:
    """What 480 steps leave behind: objects by type, and what else is not as before."""
    before = job.look()
    job.steps(20 * ROUND)
    after = job.look()
    # Caches of torch may gain one now and then; what a step leaves would be there 504 times.
    more = {k: n - before["objects"].get(k, 0) for k, n in after["objects"].items()}
    others = {w for w in before if w != "objects" and after[w] != before[w]}
    return {k: n for k, n in more.items() if n >= 100}, others


def _steps_of_a_job(rank: int) -> None:
    job = _Counted()
    job.steps(2 * ROUND)
    job.look()
    assert _grown(job) == ({}, set())
    job.leaks = True
    objects, others = _grown(job)
    assert objects == {"list": 21 * ROUND}
    assert others == {"calls"}


def test_a_job_of_two_ranks_does_not_grow(tmp_path: Path) -> None:
    on_ranks(tmp_path, 2, _steps_of_a_job)
