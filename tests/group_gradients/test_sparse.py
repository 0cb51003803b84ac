"""Sparse gradients of embeddings: kept sparse on one rank, refused by name where they would travel.

On several ranks `DistributedDataParallel` around the optimized model reduces them.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import graphopt
from graphopt.errors import GraphoptError
from graphopt.model.comparison import Observed, compare
from tests.support.ranks import on_ranks


class Words(nn.Module):
    """An embedding whose gradient has one row per distinct token."""

    def __init__(self, sparse: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(10, 4, sparse=sparse)
        self.head = nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.head(self.embed(tokens))
        return out


def _tokens(seed: int) -> Tensor:
    return torch.randint(0, 10, (5,), generator=torch.Generator().manual_seed(seed))


def _gradient(model: Any, module: Any, tokens: Tensor) -> Tensor:
    model(tokens).square().mean().backward()
    gradient: Tensor = module.embed.weight.grad
    return gradient


@pytest.mark.parametrize("verify", ["eager", "full"])
def test_one_rank_keeps_them_sparse(verify: Any) -> None:
    model = graphopt.optimize(Words(), passes="cleanup", backend="eager", verify=verify)
    plain = Words()
    actual, expected = (_gradient(m, m, _tokens(0)) for m in (model, plain))
    assert actual.layout is expected.layout is torch.sparse_coo
    assert torch.equal(actual.to_dense(), expected.to_dense())
    assert "bit-equal" in model.explain()
    for module in (model, plain):
        torch.optim.SparseAdam([module.embed.weight]).step()
    assert torch.equal(model.embed.weight, plain.embed.weight)


def test_a_sparse_gradient_that_becomes_dense_is_a_difference() -> None:
    dense = torch.eye(3)
    sparse, half = dense.to_sparse(), (dense / 2).to_sparse()

    def error(a: Tensor, b: Tensor) -> float:
        return compare(Observed({"gradient": a}), Observed({"gradient": b})).error

    assert error(sparse, dense) == float("inf")
    assert error(sparse, sparse.clone()) == 0.0
    assert error(sparse, half) == 0.5


def _on_ranks(rank: int) -> None:
    plain = Words()
    model: Any = graphopt.optimize(copy.deepcopy(plain), backend="eager")
    with pytest.raises(GraphoptError, match=r"(?s)'embed\.weight' is sparse.*sparse=False"):
        model(_tokens(rank))
    assert type(model) is Words

    graphopt.optimize(model, passes="cleanup", backend="eager")
    actual, expected = (
        _gradient(DistributedDataParallel(m), m, _tokens(rank)) for m in (model, plain)
    )
    assert actual.layout is torch.sparse_coo
    torch.testing.assert_close(actual.to_dense(), expected.to_dense())

    dense: Any = graphopt.optimize(Words(sparse=False), backend="eager")
    torch.testing.assert_close(_gradient(dense, dense, _tokens(rank)), expected.to_dense())


@pytest.mark.distributed
def test_several_ranks(tmp_path: Path) -> None:
    on_ranks(tmp_path, 2, _on_ranks)
