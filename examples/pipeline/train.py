"""Train a network in the stages of a pipeline, one per rank.

Run: ``torchrun --nproc-per-node 2 examples/pipeline/train.py --model unet``, or without
``torchrun`` in one process; ``--help`` for options. The README shows what it prints.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from data import Data, accuracy, classification, segmentation
from models import FCDenseNet, ResNet, UNet
from torch import Tensor, nn

import graphopt

# What is trained, its data, and a learning rate that suits it.
TASKS = {
    "resnet": (lambda: ResNet(10), classification, 0.1),
    "unet": (lambda: UNet(2), segmentation, 0.1),
    "fcdensenet": (lambda: FCDenseNet(2), segmentation, 0.1),
}
BATCH = 64  # images per step, over all ranks


def main() -> None:
    options = _options()
    make, load, lr = TASKS[options.model]
    data = load()
    torch.manual_seed(0)
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.epochs)

    ranks = dist.get_world_size() if dist.is_initialized() else 1
    passes = f"partition{{schedule={options.schedule},microbatches={options.microbatches}}}"
    if options.dp > 1:
        passes += ",group_gradients"
    model = graphopt.optimize(
        model,
        passes=passes,
        mesh=f"dp={options.dp},pp={ranks // options.dp}",
        loss=F.cross_entropy,
        optimizer=optimizer,
        backend="eager",
    )

    done = _resume(options.checkpoint, model, optimizer, scheduler)
    for epoch in range(done, options.until or options.epochs):
        model.train()
        losses = [model.step(images, targets) for images, targets in _batches(data, epoch, options)]
        scheduler.step()
        # Each call below brings the weights of all stages to all ranks, so all ranks make it.
        model.eval()
        with torch.no_grad():
            share = accuracy(model(data.unseen), data.answers)
        _show(f"epoch {epoch + 1}: loss {_mean(losses):.6f}, test accuracy {share:.4f}")
        _save(options.checkpoint, model, optimizer, scheduler, epoch + 1)
    _show(model.explain())


def _batches(
    data: Data, epoch: int, options: argparse.Namespace
) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of an epoch; ranks of one pipeline get the same, pipelines get shares."""
    order = torch.randperm(len(data.images), generator=torch.Generator().manual_seed(epoch))
    pipeline = dist.get_rank() // (dist.get_world_size() // options.dp) if options.dp > 1 else 0
    for batch in order.split(BATCH)[: options.steps]:
        if len(batch) == BATCH:
            own = batch.chunk(options.dp)[pipeline]
            yield data.images[own], data.targets[own]


def _mean(losses: list[Tensor | None]) -> float:
    """Of all steps of all pipelines; a pipeline that is never drained has no loss at first."""
    mean = torch.stack([loss for loss in losses if loss is not None]).mean()
    if dist.is_initialized():
        dist.all_reduce(mean)
        mean /= dist.get_world_size()
    return mean.item()


def _save(
    path: Path | None,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    epochs: int,
) -> None:
    """Write one file for all ranks; the states are gathered along the pipeline, by all of it."""
    if path is None:
        return
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "epochs": epochs,
    }
    if _first():
        torch.save(state, path)


def _resume(
    path: Path | None,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
) -> int:
    """Load what was saved by any number of ranks; how many epochs it had behind it."""
    if path is None or not path.exists():
        return 0
    state = torch.load(path)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    _show(f"resumed behind epoch {state['epochs']}")
    return int(state["epochs"])


def _first() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _show(text: str) -> None:
    if _first():
        print(text, flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", choices=TASKS, default="resnet")
    parser.add_argument(
        "--schedule",
        choices=["1f1b", "gpipe", "zero_bubble", "interleaved", "no_flush"],
        default="1f1b",
    )
    parser.add_argument("--microbatches", type=int, default=8, help="of one step")
    parser.add_argument("--dp", type=int, default=1, help="pipelines side by side")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--until", type=int, help="stop behind this epoch, to be resumed")
    parser.add_argument("--steps", type=int, help="stop each epoch after this many")
    parser.add_argument("--checkpoint", type=Path, help="resume from this file, and save to it")
    return parser.parse_args()


if __name__ == "__main__":
    if "RANK" in os.environ:  # set by torchrun
        torch.set_num_threads(1)
        dist.init_process_group("gloo")
    main()
    if dist.is_initialized():
        dist.destroy_process_group()
