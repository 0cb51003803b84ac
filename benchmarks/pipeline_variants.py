"""Training steps of one chain over two ranks: stock pipelines of PyTorch, and graphopt's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

import graphopt
from benchmarks.pipeline_models import Chain
from graphopt.plan.partition import Stages

LOSS = nn.functional.cross_entropy
OURS = ("gpipe", "1f1b", "zero_bubble", "no_flush")
TORCH = {"torch gpipe": ScheduleGPipe, "torch 1f1b": Schedule1F1B}


@dataclass(frozen=True)
class Variant:
    """One way to train.

    Attributes:
        step: trains on one batch.
        finish: ends what is in flight.
        plan: of graphopt's.
        model: what is trained.
    """

    step: Callable[[Tensor, Tensor], object]
    finish: Callable[[], object]
    plan: Stages | None
    model: nn.Module


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """The same for all."""
    return torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)


def ours(chain: Chain, schedule: str, micro_batches: int) -> Variant:
    """Graphopt's step; without flushes an update per batch, as the others have."""
    model = copy.deepcopy(chain.model)
    options = f"schedule={schedule},microbatches={micro_batches},cost=measure"
    if schedule == "no_flush":
        options += f",accumulate={micro_batches}"
    found: Any = graphopt.optimize(
        model,
        passes=f"partition{{{options}}}",
        mesh="pp=2",
        loss=LOSS,
        optimizer=optimizer(model),
        verify="structure",
        backend="eager",
    )
    found.step(*chain.batch(micro_batches))
    from graphopt.model.surface import report

    plan = report(model).specialisations[0].plan.part(Stages)
    assert plan is not None
    return Variant(found.step, model.state_dict, plan, model)


def stock(chain: Chain, name: str, micro_batches: int, plan: Stages) -> Variant:
    """PyTorch's pipeline with graphopt's stages, which are whole blocks here."""
    rank = dist.get_rank()
    model = copy.deepcopy(chain.model)
    owner = {n.split(".")[0]: i for i, s in enumerate(plan.stages) for n in s.parameters}
    own = nn.Sequential(*(c for n, c in model.named_children() if owner[n] == rank))
    stage = PipelineStage(own, rank, len(plan.stages), torch.device("cpu"))
    schedule = TORCH[name](stage, micro_batches, loss_fn=LOSS)
    sgd = optimizer(own)

    def step(x: Tensor, y: Tensor) -> None:
        sgd.zero_grad()
        if rank == 0:
            schedule.step(x)
        else:
            schedule.step(target=y, losses=[])
        sgd.step()

    return Variant(step, lambda: None, None, own)
