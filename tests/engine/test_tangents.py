"""A tangent that nobody else has dies with its last reader; any other stays what it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.model.controller import controller_of

X = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))


def _model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 64))
    return graphopt.optimize(model, (X,), backend="eager", verify="off")


def test_it_dies_before_the_backward_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model()
    use = torch._C._storage_Use_Count
    backward = controller_of(model).variants[0].engine.backward
    run, counts = backward._run, []

    def watched(arguments: list[Any]) -> Any:
        (memory,) = (t.untyped_storage() for t in arguments if t.shape == (64, 64))
        results = run(arguments)
        counts.append(use(memory._cdata))
        return results

    monkeypatch.setattr(backward, "_run", watched)
    model(X).square().sum().backward()
    kept: list[Tensor] = []
    out = model(X)
    out.register_hook(kept.append)
    out.square().sum().backward()
    assert counts == [1, 2]  # this test alone, and a hook that keeps the tangent
    assert torch.equal(kept[0], 2 * out.detach())


def test_what_others_hold_is_left_alone() -> None:
    model = _model()
    given = torch.randn(64, 64)
    copy = given.clone()
    model(X).backward(given)
    assert torch.equal(given, copy)
    out = model(X)
    out.retain_grad()
    out.square().sum().backward()
    assert torch.equal(out.grad, 2 * out.detach())
    seen: list[Tensor] = []
    out = model(X)
    out.grad_fn.register_hook(lambda _, gradients: seen.extend(gradients))
    out.square().sum().backward()
    assert torch.equal(seen[0], 2 * out.detach())
    out = model(X)
    twice = torch.zeros(64, 64, requires_grad=True)
    (out + twice).square().sum().backward()  # one tangent for two nodes
    assert torch.equal(twice.grad, 2 * out.detach())


def test_a_graph_that_is_kept_runs_again() -> None:
    model = _model()
    loss = model(X).square().sum()
    loss.backward(retain_graph=True)
    first = [p.grad.clone() for p in model.parameters()]
    loss.backward()
    assert all(torch.equal(p.grad, 2 * g) for p, g in zip(model.parameters(), first, strict=True))
