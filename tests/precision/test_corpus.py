"""Every model of the corpus in bfloat16: as near to float64 as under autocast, and it trains."""

from __future__ import annotations

import copy
import statistics
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.analysis import gradient_order
from graphopt.passes.precision import Precision
from graphopt.testing.corpus import CORPUS, CorpusModel
from tests.precision.test_pass import QUICK

SPEC = "cleanup,precision{cost=roofline}"
# The model lowers itself; float64 does not fit its parts.
OTHERS = {"autocast", "running_statistics"}
NAMES = [name for name in CORPUS if name not in OTHERS]

pytestmark = pytest.mark.corpus


@pytest.fixture(autouse=True)
def _pays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gradient_order.ASSUMED, "cpu", QUICK)


def made(entry: CorpusModel) -> tuple[nn.Module, Any, Any]:
    """Without dropout, which draws other numbers in other types."""
    model, args, kwargs = entry.make()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0  # type: ignore[assignment]
    return model, args, kwargs


def _gradients(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None])


def _double(value: object) -> object:
    is_float = isinstance(value, Tensor) and value.is_floating_point()
    return value.double() if is_float else value  # type: ignore[union-attr]


def _one_step(entry: CorpusModel, model: nn.Module, args: Any, kwargs: Any) -> Tensor:
    torch.manual_seed(1)
    entry.loss(model(*args, **kwargs)).backward()
    return _gradients(model)


def _train(entry: CorpusModel, model: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Tensor]:
    """Losses of all steps, and the gradients of the first."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses, first = [], torch.zeros(0)
    for step in range(20):
        optimizer.zero_grad()
        torch.manual_seed(1)
        loss = entry.loss(model(*args, **kwargs))
        loss.backward()
        first = _gradients(model) if step == 0 else first
        optimizer.step()
        losses.append(loss.item())
    return losses, first


@cache
def _found(name: str) -> tuple[float, float, float]:
    """Relative errors of all gradients together, under autocast and with the pass; of losses."""
    entry = CORPUS[name]
    model, args, kwargs = made(entry)
    wide = copy.deepcopy(model).double()
    doubled = {k: _double(v) for k, v in kwargs.items()}
    exact = _one_step(entry, wide, tuple(map(_double, args)), doubled)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        by_autocast = _one_step(entry, copy.deepcopy(model), args, kwargs)
    wanted, _ = _train(entry, copy.deepcopy(model), args, kwargs)
    lowered = graphopt.optimize(model, passes=SPEC, backend="eager", verify="structure")
    losses, found = _train(entry, lowered, args, kwargs)
    assert "runs in bf16" in lowered.explain()
    assert len(found) == len(exact)
    errors = (float((g - exact).norm() / exact.norm()) for g in (by_autocast, found))
    off = max(abs(a - b) for a, b in zip(losses, wanted, strict=True)) / max(wanted)
    return (*errors, off)  # type: ignore[return-value]


@pytest.mark.parametrize("name", NAMES)
def test_training_goes_as_in_float32(name: str) -> None:
    by_autocast, found, off = _found(name)
    assert off <= Precision().numerics.bound  # as in the report
    assert found <= 1.3 * by_autocast


def test_gradients_are_as_near_to_float64_as_under_autocast() -> None:
    errors = [_found(name)[:2] for name in NAMES]
    assert statistics.median(ours / autocast for autocast, ours in errors) <= 1.01
