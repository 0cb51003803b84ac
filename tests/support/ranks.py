"""Run a function on several Gloo ranks over loopback, bounded in time.

Ranks are forked from a server that has imported everything once and done nothing else: no thread,
no autograd engine and no parallel region has ever run in it. A rank is therefore as good as a new
process, for a hundredth of the price.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing import forkserver, get_context, parent_process, set_forkserver_preload
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from graphopt.testing import runtime_check

LIMIT = 240.0  # seconds for all ranks together, whatever they wait for


def on_ranks(
    folder: Path, world: int, work: Callable[..., None], *args: Any, timeout: int = 60
) -> None:
    """``work(rank, *args)`` on `world` processes; an error of any of them fails the test."""
    store = folder / f"store{len(list(folder.glob('store*')))}"
    in_processes(world, _enter, world, str(store), timeout, work, args)


def in_processes(count: int, work: Callable[..., None], *args: Any) -> None:
    """``work(index, *args)`` on `count` processes without a process group; none outlives the call.

    As with `torch.multiprocessing.spawn`, the first error ends the other processes and is raised
    here with its traceback.
    """
    _start_server()
    end = time.monotonic() + LIMIT + 10  # before that they end themselves
    context = mp.start_processes(
        _begin,
        args=(LIMIT, dict(os.environ), work, args),
        nprocs=count,
        join=False,
        start_method="forkserver",
    )
    try:
        while not context.join(timeout=max(end - time.monotonic(), 0)):
            assert time.monotonic() < end, f"ranks that do not end: {context.pids()}"
    finally:
        for process in context.processes:
            process.kill()
            process.join()


def _enter(
    rank: int,
    world: int,
    store: str,
    timeout: int,
    work: Callable[..., None],
    args: tuple[Any, ...],
) -> None:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=timeout),
    )
    dist.barrier()  # none may be done and gone while others still connect to it
    try:
        work(rank, *args)
    finally:
        dist.destroy_process_group()


def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the ranks of `check_runtime` be forked from the server, too."""
    _start_server()
    context = get_context("forkserver")
    found = SimpleNamespace(get_context=lambda _: context)
    monkeypatch.setattr(runtime_check, "multiprocessing", found)


# -- processes -------------------------------------------------------------------------------------


def _begin(
    index: int,
    limit: float,
    environment: dict[str, str],
    work: Callable[..., None],
    args: tuple[Any, ...],
) -> None:
    os.environ.clear()
    os.environ.update(environment)  # the test's, not the server's
    torch.set_num_threads(1)
    # A process that hangs says where, and ends; so does one whose test is gone.
    faulthandler.dump_traceback_later(limit, exit=True)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    work(index, *args)
    # Only reached when all went well. Threads of Gloo and DistributedDataParallel may outlive the
    # interpreter and then abort the process (SIGABRT); a process that simply ends has no such race.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _start_server() -> None:
    """Start the server of this process, unless it runs already."""
    set_forkserver_preload(["tests.support.preloaded"])
    with _environment(
        PYTHONPATH=os.pathsep.join(sys.path),
        OMP_NUM_THREADS="1",
        MKL_NUM_THREADS="1",
        OPENBLAS_NUM_THREADS="1",
    ):
        forkserver.ensure_running()


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
