"""Dropout is eager's: the mask's rounding, and the input itself in eval mode."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.model.controller import controller_of


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("p", [0.1, 0.3, 0.5])
def test_gradients_in_lower_precision(p: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 64), nn.Dropout(p)).to(dtype)
    plain = copy.deepcopy(model)
    graphopt.optimize(model, backend="eager")
    x = torch.randn(64, 4, dtype=dtype)
    for m in (model, plain):
        torch.manual_seed(1)
        m(x).float().square().mean().backward()
    pairs = zip(model.parameters(), plain.parameters(), strict=True)
    assert all(torch.equal(a.grad, b.grad) for a, b in pairs)


class Writes(nn.Module):
    def __init__(self, p: float) -> None:
        super().__init__()
        self.drop, self.lin = nn.Dropout(p), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.drop(x)
        h.mul_(2)
        y: Tensor = self.lin(h)
        return y


@pytest.mark.parametrize(("p", "training"), [(0.5, False), (0.0, True)])
def test_what_does_nothing_returns_its_input(p: float, training: bool) -> None:
    torch.manual_seed(0)
    model = Writes(p).train(training)
    plain = copy.deepcopy(model)
    graphopt.optimize(model, backend="eager")
    ours, theirs = (torch.ones(3, 4) for _ in range(2))
    assert torch.equal(model(ours), plain(theirs))
    assert torch.equal(ours, theirs)
    assert ours.tolist() == torch.full((3, 4), 2.0).tolist()
    assert controller_of(model).made == 1
