"""What both scripts share: the processes, the data and the loop; none of it knows graphopt."""

from __future__ import annotations

import argparse
import gc
import hashlib
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.nn  # see `data_parallel`
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from train_digits import DigitsNet as DigitsNet
from train_digits import digits

BATCH = 32  # per rank


def data_parallel(main: Callable[[], None]) -> None:
    """Call `main` in the process group that ``torchrun`` describes; weights differ by rank."""
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    torch.manual_seed(dist.get_rank())
    try:
        main()
    finally:
        # Whatever holds the group keeps its threads alive, and one that is still at work when the
        # interpreter ends aborts the process. A model holds it, and so do the default arguments
        # of torch.distributed.nn where that is first imported, by DDP or an optimizer, while
        # there is a group; hence the import above.
        gc.collect()
        dist.destroy_process_group()


def train(model: nn.Module) -> None:
    """Train, print loss and accuracy per epoch, and check that all ranks hold the same weights."""
    arguments = _arguments()
    images, labels, *test = digits()
    data = TensorDataset(images, labels)
    sampler = DistributedSampler(data, seed=1)
    loader = DataLoader(data, BATCH, sampler=sampler, drop_last=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for epoch in range(arguments.epochs):
        sampler.set_epoch(epoch)
        model.train()
        total, steps = torch.zeros(()), 0
        for batch in loader:
            if steps == arguments.steps:
                break
            total += _step(model, optimizer, *batch)
            steps += 1
        dist.all_reduce(total)
        mean = total.item() / (steps * dist.get_world_size())
        show(f"epoch {epoch + 1}: loss {mean:.6f}, test accuracy {_accuracy(model, *test):.4f}")
    _same_weights(model)
    if arguments.save and dist.get_rank() == 0:
        torch.save(getattr(model, "module", model).state_dict(), arguments.save)


def show(text: str) -> None:
    """Print on rank 0."""
    if dist.get_rank() == 0:
        print(text, flush=True)


def _step(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor
) -> Tensor:
    optimizer.zero_grad()
    loss = F.cross_entropy(model(images), labels)
    loss.backward()
    optimizer.step()
    return loss.detach()


def _accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Of this rank's model; called on all ranks, because DDP's forward is a collective."""
    model.eval()
    with torch.no_grad():
        return (model(images).argmax(1) == labels).float().mean().item()


def _same_weights(model: nn.Module) -> None:
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(parameter.detach().numpy().tobytes())
    hashes: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(hashes, digest.hexdigest()[:16])
    if len(set(hashes)) > 1:
        raise SystemExit(f"the weights differ between ranks: {', '.join(hashes)}")
    show(f"weights {hashes[0]} on all {len(hashes)} ranks")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--steps", type=int, help="stop each epoch after this many")
    parser.add_argument("--save", help="write rank 0's weights to this file")
    return parser.parse_args()
