"""What it costs a step of two ranks that its messages are numbered and its waits looked after.

Run: ``python -m benchmarks.job_watch``. Two models alternate within one job over Gloo on this
machine; of one, messages are sent without a number and waits are not noted. The network is small,
so that a step is hardly more than what surrounds it.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn

import graphopt
from benchmarks.harness import alternate, keep, milliseconds, ratio
from graphopt.analysis.gradient_order import gradient_order
from graphopt.runtime.engine.step import Half

ROUNDS = 1500
PASSES = "cleanup,group_gradients{link=10gbe}"


def _rank(rank: int, port: int, cache: str) -> None:
    from graphopt.runtime.group_gradients import reducing
    from graphopt.runtime.ranks.channel import Channel

    torch.set_num_threads(1)
    os.environ["XDG_CACHE_HOME"] = cache
    store = dist.TCPStore("127.0.0.1", port, 2, rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    real, nothing = Channel.waiting, nullcontext()
    looks = True

    def waiting(self: Channel, *args: Any, **kwargs: Any) -> Any:
        return real(self, *args, **kwargs) if looks else nothing

    def step(watched: bool) -> Callable[[], None]:
        torch.manual_seed(0)
        layers = [part for _ in range(4) for part in (nn.Linear(64, 64), nn.ReLU())]
        model: Any = graphopt.optimize(
            nn.Sequential(*layers), passes=PASSES, backend="eager", verify="off"
        )
        x = torch.randn(16, 64)

        def run() -> None:
            nonlocal looks
            looks = watched
            model.zero_grad()
            model(x).sum().backward()

        # The first step builds the form of the backward.
        with nullcontext() if watched else mock.patch.object(reducing, "stamped", _unstamped):
            run()
        return run

    # By estimated times both models have the same groups; measured ones differ from run to run.
    estimated = mock.patch(
        "graphopt.passes.group_gradients.measured_order", lambda graph, _: graph.get(gradient_order)
    )
    with estimated, mock.patch.object(Channel, "waiting", waiting):
        times = alternate({"watched": step(True), "unwatched": step(False)}, ROUNDS, warmup=20)
    if rank == 0:
        result = {
            "milliseconds": milliseconds(times),
            "watched / unwatched": ratio(times, "watched", "unwatched"),
        }
        print(result, flush=True)
        keep("job_watch", result)
    dist.barrier()


def _unstamped(half: Half, _: int) -> tuple[Half, None]:
    return half, None


def main() -> None:
    """Start both ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as cache:
        ranks = [context.Process(target=_rank, args=(rank, port, cache)) for rank in range(2)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join(170)
            process.kill()


if __name__ == "__main__":
    main()
