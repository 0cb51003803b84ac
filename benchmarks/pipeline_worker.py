"""One rank of the pipeline benchmark; `benchmarks.pipeline` starts two of them.

``python -m benchmarks.pipeline_worker CONFIG RANK`` reads a JSON file and writes
``<folder>/rank<RANK>.json``.
"""

from __future__ import annotations

import gc
import json
import os
import random
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.pipeline_models import chain
from benchmarks.pipeline_variants import LOSS, OURS, TORCH, Variant, optimizer, ours, stock
from graphopt.plan.partition import Stages

WARMUP = 2


@dataclass(frozen=True)
class Config:
    """What both ranks are told.

    Attributes:
        model: a name of `pipeline_models.chain`.
        folder: for the store and the results.
        blocks: rounds of all variants.
        steps: of a variant in a block, in a row and without waiting for the other rank.
        micro_batches: of a step; one round of blocks for each.
    """

    model: str
    folder: str
    blocks: int
    steps: int
    micro_batches: tuple[int, ...]


def measure(config: Config, micro_batches: int) -> dict[str, Any]:
    """Seconds per step of each variant and block, and what graphopt had planned."""
    case = chain(config.model)
    batch = case.batch(micro_batches)
    variants: dict[str, Variant] = {n: ours(case, n, micro_batches) for n in OURS}
    plan = next(v.plan for v in variants.values() if v.plan is not None)
    variants |= {name: stock(case, name, micro_batches, plan) for name in TORCH}
    times: dict[str, list[float]] = {name: [] for name in variants}
    order = random.Random(0)
    for block in range(-1, config.blocks):
        names = list(variants)
        order.shuffle(names)
        for name in names:
            steps = WARMUP if block < 0 else config.steps
            seconds = _block(variants[name], batch, steps)
            if block >= 0:
                times[name].append(seconds)
    return {
        "times": times,
        "plans": {n: _planned(v.plan) for n, v in variants.items() if v.plan is not None},
        "loss": _loss(case, variants, batch),
        "update": _update(variants["1f1b"]),
        "message": _message(variants["1f1b"].plan),
    }


def _block(variant: Variant, batch: Any, steps: int) -> float:
    """Seconds per step; a pipeline that is never drained is full before the clock starts."""
    variant.step(*batch)
    gc.collect()
    gc.disable()
    dist.barrier()
    start = time.perf_counter()
    for _ in range(steps):
        variant.step(*batch)
    dist.barrier()
    seconds = (time.perf_counter() - start) / steps
    gc.enable()
    variant.finish()
    return seconds


def _planned(plan: Stages) -> dict[str, Any]:
    return {
        "step": plan.step,
        "stages": [[s.forward, s.input_grad, s.weight_grad] for s in plan.stages],
        "modules": [list(s.modules) for s in plan.stages],
        "bytes": sum(c.bytes for c in plan.crossings if not c.back),
    }


def _loss(case: Any, variants: dict[str, Variant], batch: Any) -> dict[str, float]:
    """Of the synchronous variants after as many steps, where the model is at hand."""
    found = {}
    for name in ("gpipe", "1f1b", "zero_bubble"):
        with torch.no_grad():
            found[name] = float(LOSS(variants[name].model(batch[0]), batch[1]))
    return found


def _update(variant: Variant) -> float:
    """Seconds of an optimizer step of this rank's share, the median of several."""
    own = [p for p in variant.model.parameters() if p.grad is not None]
    sgd = optimizer(torch.nn.ParameterList(own))
    for parameter in own:
        parameter.grad = torch.zeros_like(parameter)
    times = []
    for _ in range(15):
        start = time.perf_counter()
        sgd.step()
        times.append(time.perf_counter() - start)
    return sorted(times)[len(times) // 2]


def _message(plan: Stages | None) -> float:
    """Seconds of a message of the size of what crosses the cut: half of there and back."""
    assert plan is not None
    size = sum(c.bytes for c in plan.crossings if not c.back)
    buffer = torch.zeros(max(1, size), dtype=torch.uint8)
    times = []
    for _ in range(21):
        dist.barrier()
        start = time.perf_counter()
        if dist.get_rank() == 0:
            dist.send(buffer, 1)
            dist.recv(buffer, 1)
        else:
            dist.recv(buffer, 0)
            dist.send(buffer, 0)
        times.append((time.perf_counter() - start) / 2)
    return sorted(times)[len(times) // 2]


def main(path: str, rank: int) -> None:
    """Measure all numbers of micro-batches, and write what was found."""
    given = json.loads(Path(path).read_text())
    config = Config(**{**given, "micro_batches": tuple(given["micro_batches"])})
    torch.set_num_threads(1)
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) > 1:
        os.sched_setaffinity(0, {cores[rank]})
    dist.init_process_group(
        "gloo",
        init_method=f"file://{config.folder}/store",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=120),
    )
    found = {str(m): measure(config, m) for m in config.micro_batches}
    (Path(config.folder) / f"rank{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # threads of Gloo may outlive the interpreter


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
