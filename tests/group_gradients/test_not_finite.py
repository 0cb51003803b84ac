"""A gradient that is not finite is said once, whatever groups it hits and however they are sent."""

from __future__ import annotations

import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import graphopt
from tests.support.ranks import on_ranks

pytestmark = pytest.mark.distributed


def _work(options: str, rank: int) -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(256, 256, bias=False) for _ in range(9)]
    model = graphopt.optimize(
        nn.Sequential(*layers),
        passes=f"cleanup,group_gradients{{link=10gbe{options}}}",
        backend="eager",
    )
    assert "not finite" not in model.explain()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(5):
            x = torch.randn(4, 256)
            if rank == 1 and step == 2:
                x[0, 0] = float("nan")
            model.zero_grad()
            model(x).sum().backward()
    said = [str(w.message) for w in caught if "not finite" in str(w.message)]
    assert len(said) == 1, said
    assert "not finite" in model.explain()


@pytest.mark.parametrize("options", ["", ",stale=double_buffer", ",stale=lag", ",wire=bf16"])
def test_two_ranks(tmp_path: Path, options: str) -> None:
    on_ranks(tmp_path, 2, partial(_work, options))
