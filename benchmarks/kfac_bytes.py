"""What K-FAC sends: exact bytes against an all-reduce of full factors in every step.

Two Gloo ranks train for some steps, on handwritten digits and on random tokens. Reported is what
both together put on the wire per step, for statistics alone and for everything, and what the same
model's factors would cost as full matrices, all-reduced in every step.

    python -m benchmarks.kfac_bytes
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import graphopt
from benchmarks.harness import keep
from benchmarks.models import digits_resnet, transformer
from graphopt.model.controller import controller_of
from graphopt.plan.kfac import DENSE, Block, Curvature

WORLD, STEPS, BATCH = 2, 20, 64
SPECS = {
    "every step": "kfac{interval=1}",
    "stale": "kfac{interval=stale}",
    "interval 10": "kfac{interval=10}",
    "stale, bf16": "kfac{interval=stale,wire=bf16}",
    "stale, all ranks keep": "kfac{interval=stale,fraction=1}",
}


def _digits() -> tuple[nn.Module, Callable[[nn.Module, int], Tensor]]:
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(digits.target)

    def loss(model: nn.Module, seed: int) -> Tensor:
        chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))[:BATCH]
        return F.cross_entropy(model(images[chosen]), labels[chosen])

    return digits_resnet(), loss


def _transformer() -> tuple[nn.Module, Callable[[nn.Module, int], Tensor]]:
    def loss(model: nn.Module, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(128, (BATCH, 16), generator=generator)
        return F.cross_entropy(model(tokens).logits.flatten(0, 1), tokens.flatten())

    return transformer(2)[0], loss


MODELS = {"small ResNet": _digits, "small transformer": _transformer}


def _work(rank: int, store: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
    results = {name: _measure(rank, make) for name, make in MODELS.items()}
    if rank == 0:
        Path(out).write_text(json.dumps(results))
    dist.destroy_process_group()
    os._exit(0)  # Gloo's threads may outlive the interpreter.


def _measure(rank: int, make: Callable[[], Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for label, spec in SPECS.items():
        model, loss = make()
        model = graphopt.optimize(model, passes=spec, backend="eager", verify="structure")
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        for step in range(STEPS):
            optimizer.zero_grad()
            loss(model, 2 * step + rank).backward()
            optimizer.step()
        controller: Any = controller_of(model)
        curvature = controller.variants[0].entry.plan.part(Curvature)
        full = full_factors(curvature.blocks, WORLD)
        sent = dict(controller.session.part("kfac").division.exchange.sent)
        per_step = {kind: round(count / STEPS) for kind, count in sent.items()}
        of_factors = sum(count for kind, count in sent.items() if kind != "gradients") / STEPS
        found[label] = {
            "bytes_per_step": per_step,
            "full_factors_bytes_per_step": full,
            "factors_ratio": round(of_factors / full, 4),
        }
    return found


def full_factors(blocks: Sequence[Block], world: int, itemsize: int = 4) -> int:
    """Bytes of one all-reduce of all factors as full matrices, counted as in `Exchange.sent`.

    That is what K-FAC sends in each step if it neither packs symmetric factors, nor sends them to
    owners only, nor skips steps.
    """
    numbers = sum(
        side.blocks * (side.size**2 if side.form == DENSE else side.size)
        for block in blocks
        for side in block.sides
    )
    return 2 * (world - 1) * numbers * itemsize


def main() -> None:
    """Measure, keep and print."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out")
        mp.spawn(_work, args=(str(Path(folder, "store")), str(out)), nprocs=WORLD)
        results = json.loads(out.read_text())
    keep("kfac_bytes", {"world": WORLD, "steps": STEPS, "batch_per_rank": BATCH, "models": results})
    for model, rows in results.items():
        print(model)
        for label, row in rows.items():
            print(
                f"  {label:22} full factors {row['full_factors_bytes_per_step']:>12,}  "
                f"ratio {row['factors_ratio']:.3f}  {row['bytes_per_step']}"
            )


if __name__ == "__main__":
    main()
