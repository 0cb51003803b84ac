"""Every model of the corpus in flex tensors: near to float32, sane statistics, half the memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import graphopt
from graphopt.model.controller import controller_of
from graphopt.ops.flex import UNKNOWN
from graphopt.testing.corpus import CORPUS, CorpusModel
from tests.flexpoint.models import gradients, part_of, state_of

pytestmark = pytest.mark.corpus

SPEC = "cleanup,flexpoint{exponent=8}"
# The model lowers itself.
LOWERED = {"autocast"}
# Gradients amplify rounding: a norm over few and nearly equal values, and a ReLU behind it.
SENSITIVE = {"resnet": 3e-2, "densenet": 2e-1}
# At first their gradients are as small as rounding makes them, and grow within a step.
GROWING = {"transformer_encoder"}


def _made(entry: CorpusModel) -> tuple[nn.Module, Any, Any]:
    """Without dropout, whose scales make losses incomparable."""
    model, args, kwargs = entry.make()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0  # type: ignore[assignment]
    return model, args, kwargs


def _train(entry: CorpusModel, spec: str) -> tuple[nn.Module, torch.Tensor, list[float]]:
    """Gradients of the first step and all losses; in plain PyTorch without a spec."""
    model, args, kwargs = _made(entry)
    if spec:
        graphopt.optimize(model, passes=spec, backend="eager", verify="structure")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    losses, first = [], torch.zeros(0)
    for step in range(4):
        optimizer.zero_grad()
        torch.manual_seed(1)
        loss = entry.loss(model(*args, **kwargs))
        loss.backward()
        first = gradients(model) if step == 0 else first
        optimizer.step()
        losses.append(loss.item())
    return model, first, losses


@pytest.mark.parametrize("name", [n for n in CORPUS if n not in LOWERED])
def test_a_few_steps(name: str) -> None:
    _, exact, wanted = _train(CORPUS[name], "")
    model, found, losses = _train(CORPUS[name], SPEC)
    error = float((found - exact).norm() / exact.norm())
    assert error < SENSITIVE.get(name, 3e-3)
    for one, other in zip(wanted, losses, strict=True):
        assert abs(one - other) < 2e-3 * abs(one)
    part, state = part_of(model), state_of(model)
    counters, exponents = state[f"counters/{part.key}"], state[f"exponents/{part.key}"]
    assert int(counters[:, 2].sum()) == 0
    share = float(counters[:, 1].sum() / counters[:, 3].sum())
    assert share < (5e-2 if name in GROWING else 1e-3)
    seen = counters[:, 4] > 0
    assert bool((exponents[seen] != UNKNOWN).all())
    assert float(seen.float().mean()) >= 0.85
    bits = float(state[f"bits/{part.key}"].sum() / counters[:, 4].sum())
    assert 11.5 < bits < 14.5
    assert "flexpoint: " in model.explain()


def test_a_model_that_lowers_itself_is_declined() -> None:
    model, args, kwargs = _made(CORPUS["autocast"])
    graphopt.optimize(model, passes=SPEC, backend="eager")
    CORPUS["autocast"].loss(model(*args, **kwargs)).backward()
    assert "lowered-already" in model.explain()
    controller = controller_of(model)
    assert controller is not None
    assert not controller.variants[0].entry.plan.parts
