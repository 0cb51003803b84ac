"""Ranks whose batches have other sizes in the same step reduce the mean of their gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import graphopt
from graphopt.model.controller import controller_of
from tests.support.ranks import on_ranks

pytestmark = pytest.mark.distributed

# Batch and length of each rank in each step; a rank captures where the other one does not.
STEPS = (((4, 5), (4, 5)), ((4, 7), (4, 5)), ((3, 6), (6, 9)), ((2, 4), (2, 8)), ((5, 3), (1, 6)))


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(16, 8), nn.LayerNorm(8), nn.Linear(8, 3))


def _train(rank: int) -> None:
    model = graphopt.optimize(_model(), backend="eager")
    plain = _model()
    for shapes in STEPS:
        ids = torch.randint(0, 16, shapes[rank])
        for m in (model, plain):
            m.zero_grad()
            m(ids).square().mean().backward()
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            dist.all_reduce(q.grad)
            torch.testing.assert_close(p.grad, q.grad / 2)
    controller = controller_of(model)
    assert controller is not None
    assert controller.made <= 4
    assert any(variant.entry.sizes for variant in controller.variants)


def test_ranks_with_batches_of_other_sizes(tmp_path: Path) -> None:
    on_ranks(tmp_path, 2, _train)
