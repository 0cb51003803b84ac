"""Steps that are too long in the metric of the curvature are shortened, all by one factor."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphopt
from graphopt.errors import ArgumentError
from graphopt.passes.kfac import Kfac


def _model(spec: str) -> nn.Module:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 3)).double()
    return graphopt.optimize(model, passes=spec, backend="eager", verify="structure")


def _gradients(model: nn.Module, scale: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (6,), generator=generator)
    model.zero_grad()
    (F.cross_entropy(model(x), y) * scale).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def _length(found: dict[str, Tensor], plain: dict[str, Tensor]) -> float:
    return sum(float((value * plain[name]).sum()) for name, value in found.items())


@pytest.mark.parametrize("share", [0.1, 0.9, 1.1])
def test_squared_length_is_at_most_what_was_asked_for(share: float) -> None:
    plain, whole = _gradients(_model("cleanup")), _gradients(_model("kfac{interval=1}"))
    length = _length(whole, plain)
    found = _gradients(_model(f"kfac{{interval=1,clip={share * length}}}"))
    factor = min(1.0, math.sqrt(share))
    for name, value in whole.items():
        torch.testing.assert_close(found[name], value * factor)


def test_the_scale_of_the_loss_does_not_matter() -> None:
    whole = _gradients(_model("kfac{interval=1}"))
    length = _length(whole, _gradients(_model("cleanup")))
    model = _model(f"kfac{{interval=1,clip={length / 4}}}")
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.zeros(()))
    graphopt.use_scaler(model, scaler)
    for name, value in _gradients(model, 1024.0).items():
        torch.testing.assert_close(value / 1024, whole[name] / 2)


def test_no_gradient_at_all_stays_none_at_all() -> None:
    model = _model("kfac{interval=1,clip=1.0}")
    assert all(not value.any() for value in _gradients(model, 0.0).values())


@pytest.mark.parametrize("bad", [-1.0, float("inf"), float("nan")])
def test_bad_lengths(bad: float) -> None:
    with pytest.raises(ArgumentError, match="is not a length"):
        Kfac(clip=bad)
