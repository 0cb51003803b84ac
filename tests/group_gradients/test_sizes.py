"""Ranks whose batches have other sizes in the same step reduce the mean of their gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn

import graphopt
from graphopt.errors import RankError
from graphopt.model import sites
from graphopt.model.controller import controller_of
from graphopt.runtime.ranks.agreement import Agreement
from tests.support.ranks import on_ranks

pytestmark = pytest.mark.distributed

# Batch and length of each rank in each step; a rank captures where the other one does not.
STEPS = (((4, 5), (4, 5)), ((4, 7), (4, 5)), ((3, 6), (6, 9)), ((2, 4), (2, 8)), ((5, 3), (1, 6)))

SCHEDULED = "cleanup,schedule{link=dgx-h100},group_gradients{link=dgx-h100}"


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(16, 8), nn.LayerNorm(8), nn.Linear(8, 3))


def _train(rank: int, dynamic: Any = None, passes: str = "auto") -> nn.Module:
    model = graphopt.optimize(_model(), backend="eager", dynamic=dynamic, passes=passes)
    plain = _model()
    for step, shapes in enumerate(STEPS):
        if step == 1:  # all that has to be agreed on is, whatever is captured from now on
            mock.patch.object(Agreement, "agree", _nobody_is_there).start()
        ids = torch.randint(0, 16, shapes[rank])
        for m in (model, plain):
            m.zero_grad()
            m(ids).square().mean().backward()
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            dist.all_reduce(q.grad)
            torch.testing.assert_close(p.grad, q.grad / 2)
    return model


def _nobody_is_there(*_: object, **__: object) -> str:
    raise AssertionError("a rank waits for others while it captures")


def _train_on_its_own_sizes(rank: int) -> None:
    controller = controller_of(_train(rank))
    assert controller is not None
    assert controller.made <= 4
    assert any(variant.entry.sizes for variant in controller.variants)


def test_ranks_with_batches_of_other_sizes(tmp_path: Path) -> None:
    on_ranks(tmp_path, 2, _train_on_its_own_sizes)


def _train_with_other_symbols(rank: int) -> None:
    """Sizes are symbols on one rank only: parameters, and so messages, are the same."""
    declared = {"input": {0: "batch", 1: graphopt.Dim("length", max=16)}}
    made = controller_of(_train(rank, declared if rank else False, SCHEDULED)).made
    assert made == (2 if rank else len(STEPS))


def test_ranks_that_disagree_on_what_is_dynamic(tmp_path: Path) -> None:
    on_ranks(tmp_path, 2, _train_with_other_symbols)


def _capture_too_often(rank: int) -> None:
    mock.patch.object(sites, "MAX_CAPTURES", 2).start()
    model = graphopt.optimize(_model(), backend="eager", dynamic=False)
    for length in (3, 4):
        model(torch.randint(0, 16, (2, length))).sum().backward()
    with pytest.raises(RankError, match="captured 2 times in training"):
        model(torch.randint(0, 16, (2, 5)))
    with torch.no_grad():
        model.eval()(torch.randint(0, 16, (2, 5)))
    model.train()(torch.randint(0, 16, (2, 4))).sum().backward()


def test_captures_end_with_an_error_where_plain_gradients_would_not_be_reduced(
    tmp_path: Path,
) -> None:
    on_ranks(tmp_path, 2, _capture_too_often)
