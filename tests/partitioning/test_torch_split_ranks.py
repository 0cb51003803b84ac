"""Stock schedules of ``torch.distributed.pipelining`` train across any cut, with our relays."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.distributed.pipelining import (
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    pipeline,
)

from graphopt.partitioning.from_exported import ExportedProblem
from graphopt.partitioning.planner import plan
from graphopt.partitioning.torch_split import split_policy
from graphopt.testing.corpus import CORPUS
from tests.support.ranks import on_ranks

MICRO_BATCHES = 4
SINGLE = (ScheduleGPipe, Schedule1F1B)
SEVERAL = (ScheduleInterleaved1F1B, ScheduleInterleavedZeroBubble)


class UNet(nn.Module):
    """Two skips over the bottom, a transposed value, and inputs that are read in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.down = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1)
        self.bottom = nn.Conv2d(6, 6, 3, padding=1)
        self.up, self.last = nn.Conv2d(12, 4, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)
        self.mix = nn.Linear(8, 8)

    def forward(self, scale: Tensor, x: Tensor) -> Tensor:
        outer = torch.tanh(self.first(x) * scale)
        inner = F.elu(self.down(F.max_pool2d(outer, 2)))
        h = F.elu(self.bottom(F.max_pool2d(inner, 2)))
        h = F.elu(self.up(torch.cat([inner, F.interpolate(h, scale_factor=2.0)], 1)))
        h = torch.cat([outer, F.interpolate(h, scale_factor=2.0)], 1)
        return self.last(self.mix(h).transpose(2, 3)) * scale


def _unet() -> tuple[nn.Module, tuple[Tensor, ...]]:
    torch.manual_seed(0)
    model = UNet()
    return model, (1 + torch.rand(8, 1, 1, 1), torch.randn(8, 2, 8, 8))


def _resnet() -> tuple[nn.Module, tuple[Tensor, ...]]:
    model, _, _ = CORPUS["resnet"].make()
    torch.manual_seed(1)
    return model, (torch.randn(8, 3, 16, 16),)


def _loss(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().mean()


def _wanted(make: Callable[[], Any]) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Target, gradients and output of the whole model, micro-batch by micro-batch."""
    model, inputs = make()
    outputs = []
    target = None
    for batch in zip(*(x.chunk(MICRO_BATCHES) for x in inputs), strict=True):
        output = model(*batch)
        target = torch.full_like(output, 0.3)
        (_loss(output, target) / MICRO_BATCHES).backward()
        outputs.append(output.detach())
    whole = torch.cat(outputs)
    return (
        torch.full_like(whole, 0.3),
        {n: p.grad for n, p in model.named_parameters() if p.grad is not None},
        whole,
    )


def _train(rank: int, world: int, make: Callable[[], Any]) -> None:
    target, wanted, whole = _wanted(make)
    for kind in (*SINGLE, *SEVERAL):
        model, inputs = make()
        per_rank = 1 if kind in SINGLE else 2
        example = tuple(x[: len(x) // MICRO_BATCHES] for x in inputs)
        policy = split_policy(per_rank * world)
        pipe = pipeline(model, example, split_policy=policy)
        numbers = range(rank, per_rank * world, world)
        stages = [pipe.build_stage(n, torch.device("cpu")) for n in numbers]
        given = stages[0] if kind in SINGLE else stages
        schedule = kind(given, MICRO_BATCHES, loss_fn=_loss)
        last = rank == world - 1
        output = schedule.step(*inputs if rank == 0 else (), target=target if last else None)
        if last:
            torch.testing.assert_close(output, whole)
        for stage in stages:
            for name, parameter in stage.submod.named_parameters():
                torch.testing.assert_close(parameter.grad, wanted[name], msg=f"{kind} {name}")


@pytest.mark.distributed
@pytest.mark.parametrize("make", [_unet, _resnet])
@pytest.mark.parametrize("world", [2, 4])
def test_stock_schedules_train(
    tmp_path: Path, world: int, make: Callable[[], Any]
) -> None:
    on_ranks(tmp_path, world, _train, world, make)
