"""Every model of the corpus in bfloat16: as near to float64 as under autocast, and it trains."""

from __future__ import annotations

import copy
import statistics
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.analysis import gradient_order
from graphopt.model.surface import restore
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


def _gradients(entry: CorpusModel, model: nn.Module, args: Any, kwargs: Any) -> Tensor:
    torch.manual_seed(1)
    entry.loss(model(*args, **kwargs)).backward()
    return torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None])


def _double(value: object) -> object:
    is_float = isinstance(value, Tensor) and value.is_floating_point()
    return value.double() if is_float else value  # type: ignore[union-attr]


def _errors(name: str) -> tuple[float, float]:
    """Relative errors of all gradients together: under autocast, and with the pass."""
    entry = CORPUS[name]
    model, args, kwargs = made(entry)
    wide = copy.deepcopy(model).double()
    doubled = {k: _double(v) for k, v in kwargs.items()}
    exact = _gradients(entry, wide, tuple(map(_double, args)), doubled)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        by_autocast = _gradients(entry, copy.deepcopy(model), args, kwargs)
    lowered = graphopt.optimize(copy.deepcopy(model), passes=SPEC, backend="eager")
    found = _gradients(entry, lowered, args, kwargs)
    assert "runs in bf16" in lowered.explain()
    assert len(found) == len(exact)
    return tuple(float((g - exact).norm() / exact.norm()) for g in (by_autocast, found))  # type: ignore[return-value]


def test_gradients_are_as_near_to_float64_as_under_autocast() -> None:
    errors = {name: _errors(name) for name in NAMES}
    ratios = {name: ours / autocast for name, (autocast, ours) in errors.items()}
    assert statistics.median(ratios.values()) <= 1.01
    far = {name: (errors[name], ratio) for name, ratio in ratios.items() if ratio > 1.3}
    assert not far


def _losses(entry: CorpusModel, spec: str) -> list[float]:
    model, args, kwargs = made(entry)
    graphopt.optimize(model, passes=spec, backend="eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = entry.loss(model(*args, **kwargs))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    restore(model)
    return losses


@pytest.mark.slow
def test_training_goes_as_in_float32() -> None:
    bound = Precision().numerics.bound  # as in the report
    far = {}
    for name in NAMES:
        wide, low = (_losses(CORPUS[name], spec) for spec in ("cleanup", SPEC))
        error = max(abs(a - b) for a, b in zip(low, wide, strict=True)) / max(wide)
        if not error <= bound:
            far[name] = error
    assert not far
