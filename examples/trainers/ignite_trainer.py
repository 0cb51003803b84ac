"""ignite: a trainer, an evaluator after each epoch, a checkpoint that another trainer starts from.

Run: ``python -m graphopt.examples.trainers.ignite_trainer``
"""

from __future__ import annotations

import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import graphopt
from graphopt.examples.trainers.beside import BACKEND, Run, checksum, compare, timed
from graphopt.extras import extra

with extra("harness", "this example"):
    from ignite.engine import Engine, Events, create_supervised_evaluator, create_supervised_trainer
    from ignite.handlers import Checkpoint, DiskSaver
    from ignite.metrics import Accuracy, Loss
    from sklearn.datasets import load_digits

EPOCHS = 3


def net() -> nn.Module:
    """A classifier of digits."""
    norm = nn.BatchNorm1d(32)
    return nn.Sequential(nn.Linear(64, 32), norm, nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 10))


def train(optimized: bool, folder: Path, *, accumulated: int = 1) -> Run:
    """Train two epochs, and the third one by another trainer, from the checkpoint.

    Args:
        optimized: whether graphopt is used.
        folder: for checkpoints.
        accumulated: micro-batches of a step.
    """
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images[:200], dtype=torch.float32) / 16, torch.tensor(labels[:200])
    batches = DataLoader(TensorDataset(x[:136], y[:136]), batch_size=32)  # the last has 8 examples
    unseen = DataLoader(TensorDataset(x[136:], y[136:]), batch_size=32)
    found: list[float] = []

    def made(seed: int) -> tuple[nn.Module, Engine, Checkpoint]:
        torch.manual_seed(seed)
        model = net()
        if optimized:
            graphopt.optimize(model, backend=BACKEND)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        loss = nn.CrossEntropyLoss()
        trainer = create_supervised_trainer(
            model, optimizer, loss, gradient_accumulation_steps=accumulated
        )
        evaluator = create_supervised_evaluator(model, {"loss": Loss(loss), "right": Accuracy()})
        kept = {"model": model, "optimizer": optimizer, "trainer": trainer}
        checkpoint = Checkpoint(kept, DiskSaver(folder, require_empty=False), n_saved=1)

        def evaluate() -> None:
            evaluator.run(unseen)
            found.extend(float(v) for _, v in sorted(evaluator.state.metrics.items()))

        def keep(engine: Engine) -> None:
            found.append(engine.state.output)

        trainer.add_event_handler(Events.ITERATION_COMPLETED, keep)
        trainer.add_event_handler(Events.EPOCH_COMPLETED, evaluate)
        trainer.add_event_handler(Events.EPOCH_COMPLETED, checkpoint)
        return model, trainer, checkpoint

    begin = time.perf_counter()
    _, trainer, checkpoint = made(seed=0)
    trainer.run(batches, max_epochs=EPOCHS - 1)
    model, trainer, other = made(seed=1)
    path = folder / str(checkpoint.last_checkpoint)
    Checkpoint.load_objects(other.to_save, torch.load(path, weights_only=False))
    torch.manual_seed(2)
    trainer.run(batches, max_epochs=EPOCHS)
    return Run(tuple(found), checksum(model), timed(begin), model)


def main() -> None:
    for accumulated in (1, 2):
        with tempfile.TemporaryDirectory() as place:
            case = partial(train, folder=Path(place), accumulated=accumulated)
            plain, ours = compare(f"micro-batches of a step: {accumulated}", case)
        if not plain.same(ours):
            raise SystemExit("the two runs differ")
    print(graphopt.model.surface.report(ours.model).explain())


if __name__ == "__main__":
    main()
