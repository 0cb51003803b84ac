"""One rank of the overlap benchmark; `benchmarks.overlap` starts two of them.

``python -m benchmarks.overlap_worker CONFIG RANK`` reads a JSON file and writes
``<folder>/rank<RANK>.<RATE>.json``. It asks for each rate by a file ``wanted<N>`` and waits for
``done<N>``: what is compiled is compiled before anything is measured.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import random
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn  # before there is a group, which it would hold until exit
from torch import Tensor, nn

from benchmarks.overlap_models import Case, case
from benchmarks.overlap_peers import Compiled
from benchmarks.overlap_variants import (
    CAPS,
    DEFAULT,
    PLAIN,
    buckets,
    cap_name,
    fixed_variants,
    link_variants,
    order_choice,
    predicted_exposed,
)

WORLD = 2
WARMUP = 3  # DDP regroups before its second step, so the third is the first usual one
MIN_BLOCKS = 7
SCREENED = 1.1  # a cap that takes longer than this, times the best one, is not measured
LEAST_CAPS = 3


@dataclass(frozen=True)
class Config:
    """What both ranks are told.

    Attributes:
        model: a name of `overlap_models`.
        folder: for the store and the results.
        rates: of the link, in Gbit/s, one after the other.
        seconds: for each of them, after which no new block is begun.
        blocks: at most this many.
        steps: of each variant in a block, in a row; fewer where time is short.
        without: variants that do not take part.
    """

    model: str
    folder: str
    rates: Sequence[float]
    seconds: float
    blocks: int
    steps: int
    without: Sequence[str]


class Rank:
    """The variants on this rank, run in the same order on all ranks."""

    def __init__(self, config: Config, rank: int) -> None:
        self.config = config
        self.rank = rank
        self.case: Case = case(config.model, rank)
        self.steps = 0
        self._asked = 0
        self.models = fixed_variants(self.case, config.without)
        self.failed: dict[str, str] = {}
        self.warm_up(self.models)
        self.planned = {rate: self._planned(rate) for rate in config.rates}

    def step(self, model: nn.Module) -> float:
        """Seconds of one step, begun by all ranks together."""
        around = model.around() if isinstance(model, Compiled) else nullcontext()
        with around:
            dist.barrier()
            start = time.perf_counter()
            model.zero_grad(set_to_none=True)
            loss = self.case.loss(model(*self.case.inputs))
            (model.distinct(loss) if isinstance(model, Compiled) else loss).backward()
            return time.perf_counter() - start

    def warm_up(self, models: dict[str, nn.Module]) -> None:
        """Run variants until they are as they stay; those that cannot run are taken out."""
        for name, model in list(models.items()):
            began = time.time()
            try:
                for _ in range(WARMUP):
                    self.step(model)
            except Exception as error:
                if not isinstance(model, Compiled):
                    raise
                del models[name]
                self.failed[name] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            print(f"{name}: {time.time() - began:.1f} s", self.failed.get(name, ""), flush=True)

    def measure(self, rate: float) -> dict[str, Any]:
        """What is kept of one link; every block runs the variants in random order."""
        self._ask(rate)
        until = time.time() + self.config.seconds
        models = self._screened({**self.models, **self.planned[rate]})
        round_ = sum(self.step(model) for model in models.values())
        fitting = (until - time.time()) / (MIN_BLOCKS * round_)
        self.steps = self._agree(int(fitting), self.config.steps)
        times: dict[str, list[list[float]]] = {name: [] for name in models}
        order = random.Random(0)
        for block in range(self.config.blocks):
            late = time.time() + self.steps * round_ > until
            if block >= MIN_BLOCKS and self._agree(int(not late), 1, lowest=0) == 0:
                break
            names = list(models)
            order.shuffle(names)
            for name in names:
                times[name].append([self.step(models[name]) for _ in range(self.steps)])
        return {
            "times": times,
            "steps": self.steps,
            "gradients": gradients(models),
            "buckets": {name: buckets(model) for name, model in models.items()},
            "predicted": {name: predicted_exposed(model) for name, model in models.items()},
            "order": {name: order_choice(model) for name, model in models.items()},
            "failed": self.failed,
        }

    def _planned(self, rate: float) -> dict[str, nn.Module]:
        self._ask(rate)
        # A link that was measured at another rate must not be believed.
        os.environ["XDG_CACHE_HOME"] = f"{self.config.folder}/cache{self.rank}/{rate:g}"
        models = link_variants(self.case, self.config.without)
        self.warm_up(models)
        return models

    def _screened(self, models: dict[str, nn.Module]) -> dict[str, nn.Module]:
        """Without the caps that are clearly worse than the best one, by one step of each."""
        caps = [cap_name(cap) for cap in CAPS]
        taken = {name: min(self.step(models[name]) for _ in range(2)) for name in caps}
        limit = SCREENED * sorted(taken.values())[0]
        ranked = sorted(caps, key=taken.__getitem__)
        kept = [name for i, name in enumerate(ranked) if i < LEAST_CAPS or taken[name] <= limit]
        shared = [kept]
        dist.broadcast_object_list(shared, 0)
        return {n: m for n, m in models.items() if n not in caps or n in shared[0]}

    def _ask(self, rate: float) -> None:
        """Wait until the link has this rate and the machine is ours."""
        path = Path(self.config.folder)
        self._asked += 1
        if self.rank == 0:
            request = path / "request"
            request.write_text(json.dumps(rate))
            request.rename(path / f"wanted{self._asked}")
        while not (path / f"done{self._asked}").exists():
            time.sleep(0.05)

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
        timeout=timedelta(seconds=1800),
    )
    this = Rank(config, rank)
    for rate in config.rates:
        found = {**this.measure(rate), "own core": len(cores) >= WORLD}
        part = Path(config.folder) / f"part{rank}"
        part.write_text(json.dumps(found))
        part.rename(Path(config.folder) / f"rank{rank}.{rate:g}.json")
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
