"""One rank of the overlap benchmark; `benchmarks.overlap` starts two of them.

``python -m benchmarks.overlap_worker CONFIG RANK`` reads a JSON file and writes
``<folder>/rank<RANK>.json``.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import random
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.nn  # before there is a group, which it would hold until exit
from torch import Tensor, nn

from benchmarks.overlap_models import Case, case
from benchmarks.overlap_variants import DEFAULT, PLAIN, buckets, predicted_exposed, variants

WORLD = 2
WARMUP = 3  # DDP regroups before its second step, so the third is the first usual one
MIN_BLOCKS = 4


@dataclass(frozen=True)
class Config:
    """What both ranks are told.

    Attributes:
        model: a name of `overlap_models`.
        folder: for the store and the results.
        until: the time (seconds since the epoch) at which no new block is begun.
        blocks: at most this many.
        steps: of each variant in a block, in a row; fewer where time is short.
        graphopt: whether it takes part.
    """

    model: str
    folder: str
    until: float
    blocks: int
    steps: int
    graphopt: bool


class Rank:
    """The variants on this rank, run in the same order on all ranks."""

    def __init__(self, config: Config, rank: int) -> None:
        self.config = config
        self.case: Case = case(config.model, rank)
        self.models = variants(self.case, config.graphopt)
        self.steps = 0

    def step(self, model: nn.Module) -> float:
        """Seconds of one step, begun by all ranks together."""
        dist.barrier()
        start = time.perf_counter()
        model.zero_grad(set_to_none=True)
        self.case.loss(model(*self.case.inputs)).backward()
        return time.perf_counter() - start

    def warm_up(self) -> float:
        """Run all variants until they are as they stay; seconds of the last step of all."""
        return sum([self.step(m) for m in self.models.values() for _ in range(WARMUP)][2::WARMUP])

    def run(self) -> dict[str, list[list[float]]]:
        """Seconds per variant, block and step; every block runs the variants in random order."""
        round_ = self.warm_up()
        self.steps = self._agree(
            int((self.config.until - time.time()) / (MIN_BLOCKS * round_)), self.config.steps
        )
        times: dict[str, list[list[float]]] = {name: [] for name in self.models}
        order = random.Random(0)
        for block in range(self.config.blocks):
            late = time.time() + self.steps * round_ > self.config.until
            if block >= MIN_BLOCKS and self._agree(int(not late), 1, lowest=0) == 0:
                break
            names = list(self.models)
            order.shuffle(names)
            for name in names:
                times[name].append([self.step(self.models[name]) for _ in range(self.steps)])
        return times

    def _agree(self, value: int, highest: int, lowest: int = 1) -> int:
        """Rank 0's value on all ranks, within limits."""
        shared = torch.tensor(min(max(value, lowest), highest))
        dist.broadcast(shared, 0)
        return int(shared)


def gradients(models: Mapping[str, nn.Module]) -> dict[str, dict[str, object]]:
    """Per variant: a hash of its gradients, and their worst relative distance from DDP's."""
    found = {name: [p.grad for p in model.parameters()] for name, model in models.items()}
    return {
        name: {"hash": _hash(own), "error": _error(own, found[DEFAULT])}
        for name, own in found.items()
        if name != PLAIN
    }


def _hash(tensors: list[Tensor | None]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(b"none" if tensor is None else tensor.detach().numpy().tobytes())
    return digest.hexdigest()


def _error(own: list[Tensor | None], reference: list[Tensor | None]) -> float:
    """The largest distance relative to the largest element, over all gradients."""
    return max(
        float("inf")
        if a is None or b is None
        else float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))
        for a, b in zip(own, reference, strict=True)
    )


def main(config: Config, rank: int) -> None:
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})  # before any thread is made
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{config.folder}/store",
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(seconds=120),
    )
    this = Rank(config, rank)
    times = this.run()
    result = {
        "times": times,
        "steps": this.steps,
        "gradients": gradients(this.models),
        "buckets": {name: buckets(model) for name, model in this.models.items()},
        "predicted": {name: predicted_exposed(model) for name, model in this.models.items()},
        "own core": len(cores) >= WORLD,
    }
    (Path(config.folder) / f"rank{rank}.json").write_text(json.dumps(result))
    dist.barrier()  # no rank leaves while another may still talk to it
    # A model holds the group, and a thread of the group that is at work at exit aborts the process.
    del this
    gc.collect()
    dist.destroy_process_group()


def write(config: Config) -> Path:
    """The file that is handed to the ranks."""
    path = Path(config.folder) / "config.json"
    path.write_text(json.dumps(asdict(config)))
    return path


if __name__ == "__main__":
    main(Config(**json.loads(Path(sys.argv[1]).read_text())), int(sys.argv[2]))
