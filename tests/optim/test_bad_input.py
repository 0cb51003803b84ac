"""What a user may hand to any optimizer here: gradients that are missing, sparse or zero."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from graphopt.errors import ArgumentError
from graphopt.optim import LARC, LARS, DelayedSGD, Muon, RMSpropWarmup, groups


class Net(nn.Module):
    """With a head of zeros, so that the first gradients of all below it are zero."""

    def __init__(self, sparse: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(7, 4, sparse=sparse)
        self.body = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)
        self.idle = nn.Parameter(torch.ones(4, 4))
        nn.init.zeros_(self.head.weight)

    def forward(self, ids: Tensor) -> Tensor:
        """Scores of three classes for rows of tokens."""
        scores: Tensor = self.head(torch.tanh(self.body(self.table(ids).mean(1))))
        return scores


IDS = torch.tensor([[1, 2, 3], [4, 5, 1]])


def _loss(model: nn.Module) -> Tensor:
    return nn.functional.cross_entropy(model(IDS), torch.tensor([0, 2]))


def _parts(model: nn.Module) -> list[dict[str, Any]]:
    return groups(model, IDS, weight_decay=0.0)


MAKE: dict[str, Callable[[nn.Module], Optimizer]] = {
    "LARC": lambda m: LARC(SGD(_parts(m), 0.1)),
    "LARC around DelayedSGD": lambda m: LARC(DelayedSGD(m.parameters(), 0.1, delay=1)),
    "LARS": lambda m: LARS(_parts(m), 0.1),
    "Muon": lambda m: Muon(m, IDS, 0.1, weight_decay=0.0),
    "RMSpropWarmup": lambda m: RMSpropWarmup(m.parameters(), 0.1, steps_per_epoch=4),
    "DelayedSGD": lambda m: DelayedSGD(m.parameters(), 0.1, delay=2),
}


@pytest.mark.parametrize("name", MAKE)
def test_missing_and_zero_gradients_and_weights_of_norm_zero(name: str) -> None:
    model = Net()
    optimizer: Any = MAKE[name](model)
    first = {n: p.detach().clone() for n, p in model.named_parameters()}

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = _loss(model)
        loss.backward()
        return loss.detach()

    start = float(optimizer.step(closure))
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, first[n])}
    assert moved == {"head.weight", "head.bias"}
    for _ in range(5):
        end = float(optimizer.step(closure))
    assert end < start
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, first[n])}
    assert moved == first.keys() - {"idle"}
    assert model.idle.grad is None
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", MAKE)
def test_a_sparse_gradient_is_refused_before_anything_changes(name: str) -> None:
    model = Net(sparse=True)
    nn.init.ones_(model.head.weight)
    optimizer: Any = MAKE[name](model)
    _loss(model).backward()
    assert model.table.weight.grad is not None
    assert model.table.weight.grad.is_sparse
    before = [p.detach().clone() for p in model.parameters()]
    kept = optimizer.state_dict()["state"]
    gradients = [p.grad for p in (model.body.weight, model.head.weight)]
    copies = [g.clone() for g in gradients if g is not None]
    with pytest.raises(ArgumentError, match="a sparse gradient cannot be used") as told:
        optimizer.step()
    assert told.value.where in ("parameter 'table.weight'", "parameter '1'")
    assert "sparse=False" in told.value.hint
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert optimizer.state_dict()["state"] == kept == {}
    assert all(torch.equal(a, b) for a, b in zip(copies, gradients, strict=True))  # type: ignore[arg-type]
