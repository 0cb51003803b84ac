"""No zeros are made for a tangent that the backward only adds: a loss beside its logits."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphopt
from graphopt.model.controller import controller_of
from graphopt.runtime.engine.tangents import Expected

X = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
Y = torch.arange(6) % 4


class WithLoss(nn.Module):
    """As models of transformers are: a loss, and the logits that it is of."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.second(self.first(x).tanh())
        return F.cross_entropy(logits, Y), logits


def _pair() -> tuple[WithLoss, WithLoss]:
    torch.manual_seed(0)
    plain = WithLoss()
    ours = graphopt.optimize(copy.deepcopy(plain), (X,), backend="eager", verify="off")
    return plain, ours


def _equal(plain: nn.Module, ours: nn.Module) -> bool:
    pairs = zip(plain.parameters(), ours.parameters(), strict=True)
    return all(torch.equal(a.grad, b.grad) for a, b in pairs)


@pytest.mark.parametrize("what", ["loss", "logits", "both", "one after the other"])
def test_gradients_are_those_of_eager(what: str) -> None:
    plain, ours = _pair()
    for model in (plain, ours):
        loss, logits = model(X)
        if what == "loss":
            loss.backward()
        elif what == "logits":
            logits.square().sum().backward()
        elif what == "both":
            (loss + logits.square().sum()).backward()
        else:
            loss.backward(retain_graph=True)
            logits.square().sum().backward()
    assert _equal(plain, ours)


def test_zeros_are_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    _, ours = _pair()
    made: list[object] = []
    coerce = Expected.coerce

    def counted(self: Expected, tangent: Tensor | None) -> Tensor:
        made.append(tangent is None)
        return coerce(self, tangent)

    monkeypatch.setattr(Expected, "coerce", counted)
    ours(X)[0].backward()
    assert made == [False]
    made.clear()
    ours(X)[1].sum().backward()  # the loss's is multiplied, so it has to be zeros
    assert made == [True]  # and the logits' is added as it comes


class Passed(nn.Module):
    """The tangent of an output is a gradient itself, or comes into one that is returned."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x + self.shift, x * 2


def test_a_sum_that_is_returned_stays_a_sum() -> None:
    """Else the gradient would be the memory of another value."""
    ours = graphopt.optimize(Passed(), backend="eager", verify="off")
    for i in range(2):
        plain, x = X.clone().requires_grad_(), X.clone().requires_grad_()
        Passed()(plain)[i].sum().backward()
        ours(x)[i].sum().backward()
        assert torch.equal(x.grad, plain.grad)
    code = controller_of(ours).variants[0].engine.backward
    assert not code._may_lack
