"""Training that goes on from its last checkpoint after a rank was lost, with more or fewer ranks.

Start it, kill one of its processes, and start it again with another number of ranks:
``torchrun --nproc-per-node 4 examples/data_parallel/restart.py --checkpoint run.pt``

It ends with status 75 where starting it again may help, so that a script or the job's scheduler can
do so; ``torchrun --max-restarts 3`` does it with the same number of ranks.
"""

from __future__ import annotations

import argparse
import os
import signal
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn  # see `common.data_parallel`
import torch.nn.functional as F
from common import DigitsNet, digits, show
from torch import nn

import graphopt
from graphopt.errors import RankError

BATCH = 96  # of all ranks together, so that a step is the same with any number of them
MAY_HELP = 75  # exit status: "try again later" (sysexits.h)


def main() -> None:
    arguments = _arguments()
    dist.init_process_group("gloo", timeout=timedelta(seconds=arguments.timeout))
    torch.set_num_threads(1)
    torch.manual_seed(0)
    try:
        _train(arguments)
    except RankError as error:
        print(error, flush=True)
        # Without the interpreter's farewell, which may wait for the rank that was lost.
        os._exit(MAY_HELP if error.restart else 1)
    dist.destroy_process_group()


def _train(arguments: argparse.Namespace) -> None:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model = graphopt.optimize(DigitsNet(), backend="eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    images, labels, *_ = digits()
    begin = _load(arguments.checkpoint, model, optimizer)
    show(f"{ranks} ranks begin at step {begin}")
    for step in range(begin, arguments.steps):
        order = torch.Generator().manual_seed(step)
        rows = torch.randperm(len(images), generator=order)[:BATCH].chunk(ranks)[rank]
        if arguments.die == [rank, step]:
            os.kill(os.getpid(), signal.SIGKILL)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images[rows]), labels[rows])
        loss.backward()
        optimizer.step()
        if (step + 1) % arguments.every == 0:
            _save(arguments.checkpoint, model, optimizer, step + 1)
    show(f"loss {loss.item():.4f} after step {arguments.steps}")


def _save(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Rank 0 writes beside the last checkpoint and replaces it when all is there."""
    state = graphopt.state_dict(model)  # of all ranks
    if dist.get_rank() == 0:
        parts = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "passes": state,
            "step": step,
        }
        temporary = path.with_suffix(".part")
        torch.save(parts, temporary)
        temporary.replace(path)


def _load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """The step to go on with; 0 where there is no checkpoint."""
    if not path.exists():
        return 0
    parts: dict[str, Any] = torch.load(path)
    model.load_state_dict(parts["model"])
    optimizer.load_state_dict(parts["optimizer"])
    graphopt.load_state_dict(model, parts["passes"])
    step: int = parts["step"]
    return step


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--checkpoint", type=Path, default=Path("run.pt"))
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--every", type=int, default=10, help="steps between checkpoints")
    parser.add_argument("--timeout", type=float, default=60, help="seconds to wait for a rank")
    parser.add_argument(
        "--die", type=int, nargs=2, metavar=("RANK", "STEP"), help="to try it: kill this rank"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
