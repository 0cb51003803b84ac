"""In a job of two ranks: one choice for all, and gradients that are reduced."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import graphopt
from tests.support.ranks import on_ranks

SPECS = (
    "cleanup,precision{cost=roofline,policy=tf},schedule,group_gradients",
    "cleanup,precision,group_gradients",
)


def _trains(rank: int) -> None:
    for spec in SPECS:
        torch.manual_seed(0)
        plain = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
        model = graphopt.optimize(copy.deepcopy(plain), passes=spec, backend="eager")
        batches = torch.randn(2, 8, 16)
        model(batches[rank]).square().mean().backward()
        for batch in batches:
            (plain(batch).square().mean() / 2).backward()
        for ours, exact in zip(model.parameters(), plain.parameters(), strict=True):
            both = [torch.zeros_like(ours.grad) for _ in range(2)]
            dist.all_gather(both, ours.grad)
            assert torch.equal(*both)
            assert (ours.grad - exact.grad).abs().max() <= 0.03 * exact.grad.abs().max()
        assert "aten.addmm.default" in model.explain()


@pytest.mark.distributed
def test_gradients_of_two_ranks(tmp_path: Path) -> None:
    on_ranks(tmp_path, 2, _trains)
