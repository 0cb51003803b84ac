"""Ranks with unequally many batches, against DistributedDataParallel's own join."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import graphopt
from graphopt.errors import ArgumentError
from tests.support.models import batch, mlp
from tests.support.ranks import on_ranks

pytestmark = pytest.mark.distributed


def _trained(model: Any, rank: int, batches: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with model.join():
        for step in range(batches):
            torch.manual_seed(100 * rank + step)
            optimizer.zero_grad()
            model(torch.randn(6, 8)).square().mean().backward()
            optimizer.step()


def _as_ddp(rank: int) -> None:
    plain = mlp()
    ours: Any = graphopt.optimize(copy.deepcopy(plain), backend="eager")
    theirs = DistributedDataParallel(plain)
    batches = (3, 12, 7)[rank]  # over a step in which the noise of gradients is measured
    _trained(ours, rank, batches)
    _trained(theirs, rank, batches)
    torch.testing.assert_close(ours.state_dict(), plain.state_dict())
    for _ in range(2):  # and all go on together
        ours(batch("mlp", rank)).sum().backward()


def test_unequal_batches_train_as_with_ddp(tmp_path: Path) -> None:
    on_ranks(tmp_path, 3, _as_ddp, timeout=30)


class _TwoOutputs(nn.Module):
    """Ranks ask each other which gradients there are."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.a(x), self.b(x)


def _asks(rank: int) -> None:
    torch.manual_seed(0)
    model: Any = graphopt.optimize(_TwoOutputs(), backend="eager")
    with model.join():
        for _ in range(2 + 3 * rank):
            model.zero_grad()
            with model.no_sync():
                model(torch.ones(2, 8))[0].sum().backward()
            model(torch.ones(2, 8))[0].sum().backward()
    assert model.b.weight.grad is None
    torch.testing.assert_close(model.a.weight.grad, torch.full((4, 8), 2.0 if rank else 4.0))


def test_with_accumulation_and_absent_gradients(tmp_path: Path) -> None:
    on_ranks(tmp_path, 2, _asks, timeout=30)


def _refused(rank: int) -> None:
    for passes, expected in (
        ("group_gradients{link=10gbe,wire=int32}", r"join\(\) and wire=int32"),
        ("group_gradients{link=10gbe,stale=lag}", r"join\(\) and stale=lag"),
        ("kfac,group_gradients{link=10gbe}", r"these passes include 'kfac'"),
    ):
        model: Any = graphopt.optimize(mlp(), passes=passes, backend="eager", verify="off")

        def step(model: Any = model) -> None:
            with model.join():
                model(batch("mlp", rank)).sum().backward()

        with pytest.raises(ArgumentError, match=expected):
            step()


def test_refused_by_name(tmp_path: Path) -> None:
    on_ranks(tmp_path, 2, _refused, timeout=30)


def test_one_process_joins_nobody() -> None:
    model: Any = graphopt.optimize(mlp(), passes="group_gradients", backend="eager")
    with model.join():
        model(batch("mlp", 0)).sum().backward()
