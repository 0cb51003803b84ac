"""An optimized model inside DistributedDataParallel: gradients bit-equal to the plain model's."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import graphopt
from tests.support.ranks import on_ranks

pytestmark = pytest.mark.distributed


def _gradients(model: nn.Module, rank: int) -> list[torch.Tensor]:
    wrapped = DistributedDataParallel(model)
    torch.manual_seed(10 + rank)  # every rank has its own data
    for _ in range(2):
        model.zero_grad()
        wrapped(torch.randn(6, 8)).square().mean().backward()
    return [p.grad for p in model.parameters()]


def _work(rank: int) -> None:
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4))
    optimized = graphopt.optimize(copy.deepcopy(plain), passes="cleanup", backend="eager")
    expected, actual = _gradients(plain, rank), _gradients(optimized, rank)
    assert all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True))
    notes = graphopt.model.surface.report(optimized).notes
    assert notes == ("gradients are reduced by DistributedDataParallel, which is around the model",)


def test_two_ranks(tmp_path: Path) -> None:
    on_ranks(tmp_path, 2, _work)


def _twice(rank: int) -> None:
    model = graphopt.optimize(nn.Sequential(nn.Linear(8, 4)), backend="eager", cache="off")
    wrapped = DistributedDataParallel(model)
    with pytest.warns(UserWarning, match="reduced twice: leave DistributedDataParallel"):
        wrapped(torch.randn(6, 8)).sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wrapped(torch.randn(6, 8)).sum().backward()  # said once
    assert "reduced twice" in model.explain()


def test_passes_that_reduce_inside_of_it_are_said(tmp_path: Path) -> None:
    on_ranks(tmp_path, 2, _twice)
