"""Gradients of an optimized model in a job: those of DistributedDataParallel."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import graphopt
from graphopt.model.surface import report
from graphopt.plan.group_gradients import Reduction
from tests.support.models import MODELS, batch
from tests.support.ranks import on_ranks

pytestmark = pytest.mark.distributed


def _steps(model: nn.Module, module: Any, name: str, rank: int) -> list[dict[str, torch.Tensor]]:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    found = []
    for step in range(4):
        optimizer.zero_grad()
        model(batch(name, 10 * step + rank)).square().mean().backward()
        found.append({n: p.grad.clone() for n, p in module.named_parameters()})
        optimizer.step()
    return found


def _close(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=1e-5, atol=1e-7, msg=name)


def _like_ddp(rank: int, name: str, backend: str) -> None:
    plain = MODELS[name]()
    if rank:  # rank 0's weights must win
        torch.nn.init.constant_(next(plain.parameters()), 3.0)
    optimized = graphopt.optimize(copy.deepcopy(plain), backend=backend)
    for actual, expected in zip(
        _steps(optimized, optimized, name, rank),
        _steps(DistributedDataParallel(plain), plain, name, rank),
        strict=True,
    ):
        _close(actual, expected)
    assert "group_gradients" in optimized.explain()
    plan = report(optimized).specialisations[0].plan
    reduction = plan.part(Reduction)
    assert reduction is not None
    assert reduction.grouping.world == 2
    names = [n for group in reduction.grouping.groups for n in group.names]
    assert sorted(names) == sorted(n for n, _ in plain.named_parameters())
    assert plan == type(plan).from_json(plan.to_json())


SLOW = pytest.param("conv", "inductor", marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("name", "backend"),  # the multilayer perceptron in inductor: with narrow wires
    [*((name, "eager") for name in MODELS), ("tied", "inductor"), SLOW],
)
def test_like_ddp(name: str, backend: str, tmp_path: Path) -> None:
    on_ranks(tmp_path, 2, _like_ddp, name, backend)


def _accumulates(rank: int, stale: bool) -> None:
    plain = MODELS["mlp"]()
    optimized: Any = graphopt.optimize(copy.deepcopy(plain))
    wrapped = DistributedDataParallel(plain)
    for model, module in ((optimized, optimized), (wrapped, plain)):
        for step in range(2):
            module.zero_grad()
            with model.no_sync():
                for micro in range(2):
                    model(batch("mlp", 100 * step + 10 * micro + rank)).square().mean().backward()
            model(batch("mlp", 100 * step + 50 + rank)).square().mean().backward()
    for (name, actual), expected in zip(
        optimized.named_parameters(), plain.parameters(), strict=True
    ):
        torch.testing.assert_close(actual.grad, expected.grad, rtol=1e-5, atol=1e-7, msg=name)


def test_accumulation_like_ddp(tmp_path: Path) -> None:
    on_ranks(tmp_path, 2, _accumulates, False)
