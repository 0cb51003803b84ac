"""DistributedDataParallel under `torch.compile`, and what Inductor can do with its collectives.

With the Python reducer every gradient is one functional all-reduce in a graph that compiled
autograd captures, and passes of Inductor's group or reorder them. What of that works on CPUs over
Gloo is told by ``benchmarks/results/overlap_peers.json``, kept by ``python -m
benchmarks.overlap_peers`` (one rank, a perceptron of ten layers).
"""

from __future__ import annotations

import contextlib
import copy
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch
import torch._dynamo.config
import torch._inductor.config
import torch.distributed as dist
import torch.distributed.nn  # before there is a group, which it would hold until exit
from torch import Tensor, fx, nn
from torch._dynamo import compiled_autograd
from torch._inductor.compile_fx import compile_fx
from torch.nn.parallel import DistributedDataParallel

from benchmarks.harness import keep

_numbers = count(1)
ATEN = "aten_distributed_optimizations"
# What the constructor of DistributedDataParallel turns on for the Python reducer.
FUSE = "_fuse_ddp_communication"


@dataclass(frozen=True)
class Peer:
    """How to compile a model with its messages.

    Attributes:
        mode: `torch._dynamo.config.optimize_ddp`.
        inductor: settings of `torch._inductor.config`.
    """

    mode: str
    inductor: Mapping[str, Any] = field(default_factory=dict)

    @property
    def captures_backward(self) -> bool:
        """Whether the messages are nodes of a graph."""
        return self.mode.startswith("python_reducer")


# As torch's own comment recommends them.
_REORDERING = [
    "reorder_communication_preserving_peak_memory",
    "sink_waits_iterative",
    "reorder_communication_preserving_peak_memory",
]
PEERS = {
    "ddp compiled": Peer("ddp_optimizer"),
    "ddp compiled as one graph": Peer("no_optimization"),
    "ddp compiled, python reducer": Peer("python_reducer", {FUSE: True}),
    "ddp compiled, python reducer, forward in eager": Peer(
        "python_reducer_without_compiled_forward", {FUSE: True}
    ),
    "ddp compiled, bucketing pass": Peer("python_reducer", {"bucket_all_reduces_fx": "all"}),
    "ddp compiled, reordering passes": Peer(
        "python_reducer",
        {
            "reorder_for_compute_comm_overlap": True,
            "reorder_for_compute_comm_overlap_passes": _REORDERING,
        },
    ),
    "ddp compiled, overlap scheduling": Peer(
        "python_reducer",
        {f"{ATEN}.enable_overlap_scheduling": True, f"{ATEN}.collective_bucketing": True},
    ),
    "ddp compiled, overlap scheduling by formulas": Peer(
        "python_reducer",
        {
            f"{ATEN}.enable_overlap_scheduling": True,
            f"{ATEN}.collective_bucketing": True,
            f"{ATEN}.compute_estimator": "analytical",
        },
    ),
}


class Compiled(nn.Module):
    """A model under one of the peers; a step has to take place within `around`."""

    def __init__(self, model: nn.Module, peer: Peer) -> None:
        super().__init__()
        self.peer = peer
        self.number = next(_numbers)

        def inductor(graph: fx.GraphModule, inputs: Sequence[Any]) -> Any:
            """A backend of its own: code of another peer, compiled otherwise, would fit, too."""
            return compile_fx(graph, list(inputs))

        with self._settings():
            self.wrapped = DistributedDataParallel(copy.deepcopy(model), init_sync=False)
            self.compiled = [torch.compile(self.wrapped, backend=inductor)]  # not a submodule
            self.backward = torch.compile(backend=inductor)

    def forward(self, *inputs: Any) -> Any:
        return self.compiled[0](*inputs)

    def distinct(self, loss: Tensor) -> Tensor:
        """The same loss through views: compiled autograd knows backwards by their operators only.

        Without them it would run the code that it compiled for another peer.
        """
        for _ in range(self.number):
            loss = loss.view(())
        return loss

    @contextlib.contextmanager
    def around(self) -> Iterator[None]:
        """The settings that were compiled with, and compiled autograd where it is needed."""
        with self._settings(), contextlib.ExitStack() as stack:
            if self.peer.captures_backward:
                stack.enter_context(compiled_autograd._enable(self.backward))
            yield

    @contextlib.contextmanager
    def _settings(self) -> Iterator[None]:
        dynamo = torch._dynamo.config.patch(optimize_ddp=self.peer.mode, recompile_limit=256)
        with dynamo, torch._inductor.config.patch({FUSE: False, **self.peer.inductor}):
            yield


def try_out(peer: Peer) -> dict[str, Any]:
    """Whether a peer runs on this machine, whether its gradients are right, and its messages."""
    torch.manual_seed(0)
    model = nn.Sequential(*(m for _ in range(10) for m in (nn.Linear(128, 128), nn.ReLU())))
    x = torch.randn(32, 128)
    model(x).square().mean().backward()
    expected = [p.grad for p in model.parameters()]
    began = time.perf_counter()
    try:
        compiled = Compiled(model, peer)
        for _ in range(3):
            compiled.zero_grad(set_to_none=True)
            with compiled.around():
                compiled.distinct(compiled(x).square().mean()).backward()
        seconds = time.perf_counter() - began
        for parameter, grad in zip(compiled.parameters(), expected, strict=True):
            torch.testing.assert_close(parameter.grad, grad)
        times = []
        for _ in range(10):
            began = time.perf_counter()
            with compiled.around():
                compiled.distinct(compiled(x).square().mean()).backward()
            times.append(time.perf_counter() - began)
        with torch.profiler.profile() as profile, compiled.around():
            compiled.distinct(compiled(x).square().mean()).backward()
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        return {"works": False, "error": f"{type(error).__name__}: {' '.join(lines[:3])[:500]}"}
    counts = {event.key: event.count for event in profile.key_averages()}
    return {
        "works": True,
        "messages": counts.get("gloo:all_reduce", 0),
        "first three steps, seconds": round(seconds, 1),
        "step, milliseconds": round(1e3 * statistics.median(times), 2),
    }


def main() -> None:
    torch.set_num_threads(1)
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/s", rank=0, world_size=1)
        for name, peer in PEERS.items():
            results[name] = try_out(peer)
            print(name, results[name], flush=True)
            keep("overlap_peers", results)
    os._exit(0)  # a thread of the group that is at work at exit aborts the process


if __name__ == "__main__":
    main()
