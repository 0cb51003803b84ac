"""Lightning: mixed precision, weight averaging, accumulation, resuming, two ranks.

Run: ``python -m graphopt.examples.trainers.lightning_trainer``, and for several ranks
``torchrun --nproc-per-node 2 -m graphopt.examples.trainers.lightning_trainer``
"""

from __future__ import annotations

import os
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
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
    import lightning
    from lightning.pytorch.callbacks import StochasticWeightAveraging
    from lightning.pytorch.strategies import DDPStrategy
    from sklearn.datasets import load_digits

EPOCHS = 3

CASES: dict[str, dict[str, Any]] = {
    "float32": {},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "averaged weights": {"averaged": True},
    "two micro-batches": {"accumulate_grad_batches": 2},
}

How = Literal["none", "inside", "instead"]
"""Of DistributedDataParallel: without graphopt, with it inside, with it in its place."""


class Net(nn.Module):
    """A classifier of digits."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(64, 32), nn.BatchNorm1d(32)
        self.drop, self.last = nn.Dropout(0.1), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.drop(F.relu(self.norm(self.first(x))))
        return self.last(hidden)  # type: ignore[no-any-return]


class Digits(lightning.LightningModule):  # type: ignore[misc]
    """Trains a network; this is what is called, so this is what graphopt optimizes."""

    def __init__(self, how: How = "none") -> None:
        super().__init__()
        self.net, self.how = Net(), how
        self.losses: list[float] = []

    def setup(self, stage: str) -> None:
        # Lightning has joined the job by now, so graphopt finds its ranks.
        if self.how == "inside":
            graphopt.optimize(self.net, passes="cleanup", backend=BACKEND)
        elif self.how == "instead":
            graphopt.optimize(self.net, backend=BACKEND)

    def loss(self, batch: list[Tensor]) -> Tensor:
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        self.losses.append(loss.item())
        return loss

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: list[Tensor], _: int) -> None:
        self.loss(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


class Unwrapped(DDPStrategy):  # type: ignore[misc]
    """Ranks without DistributedDataParallel: graphopt reduces gradients."""

    def _setup_model(self, model: nn.Module) -> nn.Module:
        return model


def loader() -> DataLoader[tuple[Tensor, ...]]:
    """128 digits, always in the same order."""
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images[:128], dtype=torch.float32) / 16, torch.tensor(labels[:128])
    return DataLoader(TensorDataset(x, y), batch_size=32)


def trainer(folder: Path, *, averaged: bool = False, **options: Any) -> lightning.Trainer:
    """Of Lightning, that says little and keeps a checkpoint of each epoch."""
    # It gives batch norms `momentum=None` while it renews their averages.
    callbacks = [StochasticWeightAveraging(0.01, swa_epoch_start=1)] if averaged else []
    return lightning.Trainer(
        **{"max_epochs": EPOCHS, "devices": 1, **options},
        accelerator="cpu",
        callbacks=callbacks,
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=1,
    )


def train(optimized: bool, folder: Path, *, resume: Path | None = None, **options: Any) -> Run:
    """Train one network in one process.

    Args:
        optimized: whether graphopt is used.
        folder: for checkpoints.
        resume: a checkpoint to go on from.
        options: of the trainer.
    """
    lightning.seed_everything(0, verbose=False)
    module = Digits()
    if optimized:
        graphopt.optimize(module.net, backend=BACKEND)
    fitting = trainer(folder, **options)
    begin = time.perf_counter()
    fitting.fit(module, loader(), loader(), ckpt_path=resume, weights_only=False)
    seconds = timed(begin)
    fitting.save_checkpoint(folder / "last.ckpt")
    return Run(tuple(module.losses), checksum(module.net), seconds, module.net)


def resumed(optimized: bool, folder: Path) -> Run:
    """Train for two epochs, and go on from there with another model and another trainer.

    Lightning saves no random state, so dropout is another one than without the interruption.
    """
    train(optimized, folder, max_epochs=2)
    return train(optimized, folder / "again", resume=folder / "last.ckpt")


def rank(how: How, folder: Path) -> Run:
    """Train as one rank of a job that torchrun has started."""
    lightning.seed_everything(0, verbose=False)
    module = Digits(how)
    strategy = Unwrapped if how == "instead" else DDPStrategy
    fitting = trainer(
        folder,
        devices=int(os.environ["LOCAL_WORLD_SIZE"]),
        strategy=strategy(process_group_backend="gloo"),
        enable_checkpointing=False,
    )
    begin = time.perf_counter()
    fitting.fit(module, loader())
    seconds = timed(begin)
    # Statistics of batch norms are each rank's own; DistributedDataParallel sends those of rank 0.
    weights = checksum(nn.ParameterList(module.net.parameters()))
    return Run(tuple(module.losses), weights, seconds, module.net)


def main() -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        if "RANK" in os.environ:
            runs = [rank(how, folder) for how in ("none", "inside", "instead")]
            for title, run in zip(("inside of DDP", "in place of DDP"), runs[1:], strict=True):
                print(f"{title}: {'equal' if run.same(runs[0]) else 'DIFFERENT'}")
            print(explained(runs[2]))
            return
        cases = {t: partial(train, folder=folder / t, **options) for t, options in CASES.items()}
        cases["resumed"] = partial(resumed, folder=folder / "resumed")
        for title, case in cases.items():
            plain, ours = compare(title, case)
            if not plain.same(ours):
                raise SystemExit("the two runs differ")
        print(explained(ours))


if __name__ == "__main__":
    main()
