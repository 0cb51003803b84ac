"""A rank of a pipeline that is lost, slips or fails is an error on all, in time, that names it."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphopt
from graphopt.errors import RankError
from graphopt.runtime.partition.work import Work
from tests.support.pipelines import Residual, data
from tests.support.ranks import on_ranks

pytestmark = [pytest.mark.distributed]
TIMEOUT = 8


def _chain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(part for _ in range(6) for part in (nn.Linear(8, 8), nn.Tanh())))


def _made(model: nn.Module, options: str, mesh: str, loss: Any, more: str = "") -> Any:
    return graphopt.optimize(
        model,
        passes=f"partition{{microbatches=6,{options}}}{more}",
        mesh=mesh,
        backend="eager",
        verify="off",
        loss=loss,
        optimizer=torch.optim.SGD(model.parameters(), 0.1),
    )


def _batch(step: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(12, 8, generator=torch.Generator().manual_seed(step))
    return x, x


def _done(folder: Path, rank: int) -> None:
    (folder / f"done{rank}").touch()
    os._exit(0)


def _killed(rank: int, schedule: str, victim: int, folder: Path) -> None:
    model = _made(_chain(), f"schedule={schedule}", "pp=3", F.mse_loss)
    model.step(*_batch(0))
    if rank == victim:
        os._exit(0)
    begun = time.monotonic()
    with pytest.raises(RankError, match=f"did not arrive: rank {victim} did not answer") as raised:
        model.step(*_batch(1))
    assert raised.value.restart
    assert time.monotonic() - begun < TIMEOUT + 5
    _done(folder, rank)


@pytest.mark.parametrize(("schedule", "victim"), [("gpipe", 2), ("no_flush", 2), ("1f1b", 0)])
def test_a_stage_that_is_lost(schedule: str, victim: int, tmp_path: Path) -> None:
    on_ranks(tmp_path, 3, _killed, schedule, victim, tmp_path, timeout=TIMEOUT)
    assert len(list(tmp_path.glob("done*"))) == 2


def _leaves_out(rank: int, folder: Path) -> None:
    model = _made(_chain(), "schedule=interleaved", "pp=3", F.mse_loss)
    model.step(*_batch(0))
    expected = "ranks 1, 2 of one pipeline were given different batches: rank 2 has"

    def train() -> None:
        for step in range(2 if rank == 2 else 1, 4):
            model.step(*_batch(step))

    with pytest.raises(RankError, match=expected) as raised:
        train()
    if rank == 2:
        assert "leave out a batch on all of them or on none" in str(raised.value)
    _done(folder, rank)


def test_a_stage_that_leaves_a_batch_out(tmp_path: Path) -> None:
    on_ranks(tmp_path, 3, _leaves_out, tmp_path, timeout=TIMEOUT)
    assert len(list(tmp_path.glob("done*"))) == 3


def _fails(rank: int, folder: Path) -> None:
    steps = []

    def loss(output: Tensor, target: Tensor) -> Tensor:
        if len(steps) == 2 and output.stride() != (0, 0):  # the last stage has a real output
            raise ArithmeticError("it has overflowed")
        return F.cross_entropy(output, target)

    torch.manual_seed(0)
    model = _made(Residual(), "schedule=zero_bubble", "pp=2", loss)
    error = ArithmeticError if rank else RankError
    said = "it has overflowed" if rank else "rank 1 had failed before: ArithmeticError"

    def train() -> None:
        for step in range(3):
            steps.append(step)
            model.step(*data(step, 12))

    with pytest.raises(error, match=said):
        train()
    _done(folder, rank)


def test_a_stage_that_fails(tmp_path: Path) -> None:
    on_ranks(tmp_path, 2, _fails, tmp_path, timeout=TIMEOUT)
    assert len(list(tmp_path.glob("done*"))) == 2


def _in_a_mesh(rank: int, folder: Path, lost: int, frozen: bool) -> None:
    """Rank 0 needs nothing of rank 3: it waits for others that wait for it."""
    model = _made(_chain(), "schedule=1f1b", "dp=2,pp=2", F.mse_loss, ",group_gradients")
    model.step(*_batch(10 * (rank // 2)))
    real, forwards = Work.forward, []

    def forward(self: Any, stage: int, task: Any, **kwargs: Any) -> None:
        forwards.append(stage)
        if rank == lost and len(forwards) == 3:
            time.sleep(TIMEOUT + 5 if frozen else 0)
            os._exit(0)
        real(self, stage, task, **kwargs)

    Work.forward = forward  # type: ignore[method-assign]
    begun = time.monotonic()
    with pytest.raises(RankError, match=f"rank {lost} did not answer"):
        model.step(*_batch(1 + 10 * (rank // 2)))
    assert time.monotonic() - begun < TIMEOUT + 5  # the groups of a mesh know of it, too
    _done(folder, rank)


@pytest.mark.parametrize(("lost", "frozen"), [(3, False), (3, True), (2, True)])
def test_a_stage_of_one_replica_that_is_lost(tmp_path: Path, lost: int, frozen: bool) -> None:
    on_ranks(tmp_path, 4, _in_a_mesh, tmp_path, lost, frozen, timeout=TIMEOUT)
    assert len(list(tmp_path.glob("done*"))) == 3
