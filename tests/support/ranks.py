"""Run a function on several Gloo ranks over loopback, bounded in time."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def on_ranks(
    folder: Path, world: int, work: Callable[..., None], *args: Any, timeout: int = 60
) -> None:
    """``work(rank, *args)`` on `world` processes; an error of any of them fails the test."""
    store = folder / f"store{len(list(folder.glob('store*')))}"
    mp.spawn(_enter, args=(world, str(store), timeout, work, args), nprocs=world)


def _enter(
    rank: int,
    world: int,
    store: str,
    timeout: int,
    work: Callable[..., None],
    args: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=timeout),
    )
    try:
        work(rank, *args)
    finally:
        dist.destroy_process_group()
    # Only reached when all went well. Threads of Gloo and DistributedDataParallel may outlive the
    # interpreter and then abort the process (SIGABRT); a process that simply ends has no such race.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
