"""A loop of accelerate: graphopt before or after `prepare`, accumulation, bf16, a saved state.

Run: ``python -m graphopt.examples.trainers.accelerate_loop``
"""

from __future__ import annotations

import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import graphopt
from graphopt.examples.trainers.beside import (
    BACKEND,
    Run,
    checksum,
    compare,
    explained,
    timed,
)
from graphopt.extras import extra

with extra("harness", "this example"):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import set_seed
    from sklearn.datasets import load_digits

EPOCHS = 3

CASES: dict[str, dict[str, Any]] = {
    "float32": {},
    "bf16": {"mixed_precision": "bf16"},
    "two micro-batches": {"gradient_accumulation_steps": 2},
}

When = Literal["before", "after"]


def net() -> nn.Module:
    """A classifier of digits."""
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 10))


def train(optimized: bool, folder: Path, *, when: When = "before", **options: Any) -> Run:
    """Train; the last epoch comes twice, the second time from the state saved before it.

    Args:
        optimized: whether graphopt is used.
        folder: for the state.
        when: graphopt comes before or after `prepare`.
        options: of the `Accelerator`.
    """
    AcceleratorState._reset_state(reset_partial_state=True)  # of an earlier run in this process
    accelerator = Accelerator(cpu=True, **options)
    set_seed(0)
    model = net()
    if optimized and when == "before":
        graphopt.optimize(model, backend=BACKEND)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images[:128], dtype=torch.float32) / 16, torch.tensor(labels[:128])
    loader = DataLoader(TensorDataset(x, y), batch_size=32)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    if optimized and when == "after":
        graphopt.optimize(model, backend=BACKEND)

    def epoch() -> list[float]:
        losses = []
        for batch, wanted in loader:
            with accelerator.accumulate(model):
                loss = F.cross_entropy(model(batch), wanted)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
        return losses

    begin = time.perf_counter()
    losses = [loss for _ in range(EPOCHS - 1) for loss in epoch()]
    accelerator.save_state(folder)
    last, weights = epoch(), checksum(model)
    seconds = timed(begin)
    accelerator.load_state(folder)
    again = (epoch(), checksum(model))
    return Run((*losses, *last), weights, seconds, model, (again == (last, weights),))


def main() -> None:
    with tempfile.TemporaryDirectory() as place:
        for title, options in CASES.items():
            for when in ("before", "after"):
                folder = Path(place) / f"{title} {when}"
                case = partial(train, folder=folder, when=when, **options)
                plain, ours = compare(f"{title}, optimized {when} prepare", case)
                if not plain.same(ours) or ours.beside != (True,):
                    raise SystemExit("the two runs differ")
        print(explained(ours))


if __name__ == "__main__":
    main()
