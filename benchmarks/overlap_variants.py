"""The ways to reduce gradients that the overlap benchmark compares, each on its own copy."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import graphopt
from benchmarks.overlap_models import Case
from benchmarks.overlap_peers import PEERS, Compiled
from graphopt.grouping.baselines import mg_wfbp
from graphopt.model.surface import report
from graphopt.network.curve import Curve
from graphopt.plan.group_gradients import Reduction
from graphopt.plan.grouping import Ready

PLAIN = "no communication"
GRAPHOPT = "graphopt"
GROUPED = "graphopt grouping only"
COMPILED = "graphopt, Inductor"
# Passes and backend of each.
OURS = {
    GROUPED: ("cleanup,group_gradients", "eager"),
    GRAPHOPT: ("auto", "eager"),
    COMPILED: ("auto", "inductor"),
}
DEFAULT = "ddp default"
STILL = "ddp default, buffers not broadcast"
MG_WFBP = "ddp mg-wfbp"
CAPS = (0.5, 1, 2, 4, 6, 8, 12, 16, 24, 32)
MIB = 2**20


def cap_name(cap: float) -> str:
    """The variant with this uniform cap in MiB."""
    return f"ddp cap {cap:g} MiB"


def fixed_variants(case: Case, without: Sequence[str]) -> dict[str, nn.Module]:
    """The variants that know nothing of the link, with equal weights."""
    plain = copy.deepcopy(case.model)
    names, sizes, _ = arrivals(case, plain)
    layers = [_layers(names, sizes)]
    dist.broadcast_object_list(layers, 0)
    made: dict[str, nn.Module] = {PLAIN: plain, DEFAULT: _ddp(case)}
    if any(True for _ in case.model.buffers()):
        made[STILL] = _ddp(case, broadcast_buffers=False)
    made |= {cap_name(cap): _ddp(case, bucket_cap_mb=cap) for cap in CAPS}
    made["ddp one bucket"] = _ddp(case, bucket_cap_mb=sum(sizes) / MIB + 1)
    made["ddp per layer"] = _ddp(case, bucket_cap_mb_list=[size / MIB for size in layers[0]])
    wanted = {name: peer for name, peer in PEERS.items() if name not in without}
    return made | {name: Compiled(case.model, peer) for name, peer in wanted.items()}


def link_variants(case: Case, without: Sequence[str]) -> dict[str, nn.Module]:
    """The variants that are planned for the link as it is now; call it on all ranks at once."""
    names, sizes, ready = arrivals(case, copy.deepcopy(case.model))
    merged = [_merged(names, sizes, ready, link_cost())]
    dist.broadcast_object_list(merged, 0)
    made: dict[str, nn.Module] = {
        MG_WFBP: _ddp(case, bucket_cap_mb_list=[size / MIB for size in merged[0]])
    }
    for name, (passes, backend) in OURS.items():
        if name not in without:
            made[name] = graphopt.optimize(
                copy.deepcopy(case.model), passes=passes, backend=backend, verify="off"
            )
    return made


def predicted_exposed(model: nn.Module) -> float | None:
    """Seconds of communication that graphopt expects no computation to hide, by its newest plan."""
    grouping = _grouping(model)
    return None if grouping is None else float(grouping.exposed)


def buckets(model: nn.Module) -> list[int]:
    """Bytes of each message of the last step, in order; empty where there are none."""
    if isinstance(model, Compiled):
        model = model.wrapped
    if isinstance(model, DistributedDataParallel):
        sizes = model._get_ddp_logging_data().get("rebuilt_bucket_sizes", "")
        return [int(size) for size in sizes.split(", ") if size]
    grouping = _grouping(model)
    return [] if grouping is None else [group.bytes for group in grouping.groups]


def order_choice(model: nn.Module) -> dict[str, Any] | None:
    """What graphopt said of the order of backward: whether it was changed, and its numbers."""
    if not hasattr(model, "explain"):
        return None
    steps = [s for made in report(model).specialisations for s in made.steps]
    for step in steps:
        if step.spec.startswith("schedule"):
            for item in (*step.outcome.applied, *step.outcome.declined):
                reason = getattr(item, "reason", "applied")
                return {"reason": reason, "numbers": dict(item.numbers)}
    return None


def arrivals(case: Case, model: nn.Module) -> tuple[list[str], list[int], list[float]]:
    """Names, bytes and seconds of the gradients in the order in which backward produces them.

    The seconds count from the start of backward and are those of the slowest rank.
    """
    names: list[str] = []
    runs: list[dict[str, float]] = []
    start = 0.0

    def arrived(name: str) -> None:
        names.append(name)
        runs[-1][name] = time.perf_counter() - start

    parameters = dict(model.named_parameters())
    hooks = [
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: arrived(name))
        for name, parameter in parameters.items()
    ]
    for _ in range(5):
        model.zero_grad(set_to_none=True)
        loss = case.loss(model(*case.inputs))
        names.clear()
        runs.append({})
        start = time.perf_counter()
        loss.backward()
    for hook in hooks:
        hook.remove()
    seconds = torch.tensor([statistics.median(run[name] for run in runs[2:]) for name in names])
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return names, [parameters[name].nbytes for name in names], seconds.cummax(0).values.tolist()


def link_cost() -> Curve:
    """Seconds per message plus seconds per byte of an all-reduce, by least squares."""
    samples = []
    for size in (2**12, 2**16, 2**20, 2**22, 2**23):
        message = torch.zeros(size // 4)
        times = []
        for _ in range(4):
            dist.barrier()
            start = time.perf_counter()
            dist.all_reduce(message)
            times.append(time.perf_counter() - start)
        samples.append((float(size), statistics.median(times[1:])))
    slope, start = statistics.linear_regression(*zip(*samples, strict=True))
    return Curve.affine(max(start, 1e-5), max(slope, 1e-12))


def _merged(
    names: Sequence[str], sizes: Sequence[int], seconds: Sequence[float], cost: Curve
) -> list[int]:
    """Bytes per group by the rule of MG-WFBP."""
    ready = [Ready(*one) for one in zip(names, sizes, seconds, strict=True)]
    return [group.bytes for group in mg_wfbp(ready, cost)]


def _layers(names: Sequence[str], sizes: Sequence[int]) -> list[int]:
    """Bytes per group when neighbours of one module travel together."""
    groups: list[int] = []
    module = ""
    for name, size in zip(names, sizes, strict=True):
        owner = name.rpartition(".")[0]
        if groups and owner == module:
            groups[-1] += size
        else:
            groups.append(size)
        module = owner
    return groups


def _ddp(case: Case, **options: Any) -> DistributedDataParallel:
    return DistributedDataParallel(copy.deepcopy(case.model), init_sync=False, **options)


def _grouping(model: nn.Module) -> Any:
    if not hasattr(model, "explain"):
        return None
    parts = [made.plan.part(Reduction) for made in report(model).specialisations]
    return next((part.grouping for part in reversed(parts) if part), None)
