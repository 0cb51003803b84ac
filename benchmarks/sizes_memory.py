"""What 1,000 distinct sizes leave behind in memory.

Run ``python -m benchmarks.sizes_memory``; it leaves ``benchmarks/results/sizes_memory.json``. Each
case trains a small transformer in a process of its own, one step for each of 1,000 pairs of batch
(2 to 11) and length (2 to 101), all different, in random order, and after them the first 200 pairs
again. Memory is what the process has resident after garbage collection, every 100 steps; an
allocator keeps some of what was freed, which is why plain PyTorch is among the cases. Times are of
the processor, captures included.
"""

from __future__ import annotations

import gc
import json
import random
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

import graphopt
from benchmarks.harness import keep
from graphopt.model.controller import controller_of

CASES = {
    "plain PyTorch": None,
    "symbols": {},
    "a graph per size (dynamic=False)": {"dynamic": False},
}
SIZES, AGAIN, EVERY = 1000, 200, 100


class Tagger(nn.Module):
    """Embeddings, one layer of a transformer, a label per token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 32)
        self.layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.head = nn.Linear(32, 5)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.layer(self.embed(ids)))


def _shapes() -> Iterator[tuple[int, int]]:
    pairs = [(batch, length) for batch in range(2, 12) for length in range(2, 102)]
    random.Random(0).shuffle(pairs)
    assert len(set(pairs)) == SIZES
    yield from pairs
    yield from pairs[:AGAIN]


def _megabytes() -> float:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return round(pages * 4096 / 1e6, 1)


def measure(case: str) -> dict[str, object]:
    """One case, in this process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    options = CASES[case]
    model = Tagger()
    if options is not None:
        graphopt.optimize(model, backend="eager", verify="structure", **options)
    resident, objects = [], []
    start = time.process_time()
    for step, shape in enumerate(_shapes(), start=1):
        model.zero_grad()
        model(torch.randint(0, 64, shape)).square().mean().backward()
        if step % EVERY == 0:
            resident.append(_megabytes())
            objects.append(len(gc.get_objects()))
    controller = controller_of(model)
    return {
        "captures": controller.made if controller else 0,
        "kept": len(controller.variants) if controller else 0,
        "resident MB, every 100 steps": resident,
        "objects of Python, every 100 steps": objects,
        "processor seconds": round(time.process_time() - start, 1),
    }


def main() -> None:
    if len(sys.argv) > 1:
        warnings.simplefilter("ignore")
        print(json.dumps(measure(sys.argv[1])))
        return
    results = {}
    for case in CASES:
        command = [sys.executable, "-m", "benchmarks.sizes_memory", case]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        results[case] = json.loads(done.stdout.splitlines()[-1])
        print(case, results[case], flush=True)
    print("kept in", keep("sizes_memory", results).name)


if __name__ == "__main__":
    main()
