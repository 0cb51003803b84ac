"""Blocks owned by ranks: products and systems equal those of one process, within the bounds."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from graphopt.errors import ArgumentError, RankError
from graphopt.hierarchical.arithmetic.distributed import Distributed, owners
from graphopt.hierarchical.arithmetic.factorize import cholesky, lu
from graphopt.hierarchical.blocks import Dense, placed
from graphopt.hierarchical.clusters import by_index
from graphopt.hierarchical.matrix import HMatrix
from tests.hierarchical.built import Case
from tests.support.ranks import on_ranks

CASES = [
    Case("matern", 2, "strong", 150, torch.float64, 1e-8, 0),
    Case("log", 1, "blr", 90, torch.float64, 1e-6, 1),
    Case("exponential", 1, "hodlr", 120, torch.float32, 1e-5, 2),
]


def right_side(n: int, dtype: torch.dtype) -> Tensor:
    """[n, 3] normal numbers."""
    return torch.randn(n, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(
        dtype
    )


def equal_on_all(values: Tensor) -> bool:
    """Whether all ranks have these bits."""
    found = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(found, values.contiguous())
    return all(torch.equal(other, values) for other in found)


def _products_and_systems(rank: int, world: int) -> None:
    for case in CASES:
        matrix, values = case.matrix, case.values
        shared = Distributed.of(matrix)
        sizes = torch.zeros(world)
        sizes[rank] = shared.nbytes
        dist.all_reduce(sizes)
        assert sizes.sum() == sum(_bytes(matrix))
        assert sizes.max() <= 1.4 * sizes.mean() + max(_bytes(matrix))
        for dtype in (torch.float32, torch.float64):
            b = right_side(case.n, dtype)
            found = shared.apply(b)
            assert found.value.dtype == dtype
            assert equal_on_all(found.value)
            exact = values @ b.double()
            assert (found.value.double() - exact).norm(dim=0).max() <= found.bound
            assert found.bound < 1e-3 * exact.norm()
            factors = lu(matrix, 1e-3) if rank == 0 else None
            solution = shared.solve(b, factors)
            assert equal_on_all(solution.value)
            error = (solution.value.double() - torch.linalg.solve(values, b.double())).norm(dim=0)
            assert error.max() <= solution.bound < math.inf
            if rank == 0 and dtype == torch.float64:
                alone = lu(matrix, 1e-6).solve(b, refinements=5)
                far = (alone.value - solution.value).norm(dim=0).max()
                assert far <= alone.bound + solution.bound


def _few_leaves(rank: int, world: int) -> None:
    for n, blocks in ((10, 1), (24, 4)):
        case = Case("matern", 1, "hodlr", n, torch.float64, 1e-8, 0)
        matrix, values = case.matrix, case.values
        shared = Distributed.of(matrix)
        assert len(_bytes(matrix)) == blocks <= world
        assert shared.idle == (rank >= blocks)
        b = right_side(n, torch.float64)
        found, alone = shared.apply(b), matrix.apply(b)
        assert equal_on_all(found.value)
        assert (found.value - values @ b).norm(dim=0).max() <= found.bound
        assert (found.value - alone.value).norm(dim=0).max() <= found.bound + alone.bound
        factors = cholesky(matrix, 1e-6) if rank == 0 else None
        solution = shared.solve(b, factors)
        assert equal_on_all(solution.value)
        exact = torch.linalg.solve(values, b)
        assert (solution.value - exact).norm(dim=0).max() <= solution.bound < 1e-5


def _idle(rank: int, world: int) -> None:
    tree = by_index(4)
    values = torch.eye(4, dtype=torch.float64) * 2
    matrix = HMatrix(Dense(values), tree, tree, 0.0)
    shared = Distributed.of(matrix)
    assert shared.idle == (rank != 0)
    b = torch.arange(4.0, dtype=torch.float64)
    assert torch.equal(shared.apply(b).value, 2 * b)
    # The right-hand side of the first rank counts.
    solution = shared.solve(b + rank, cholesky(matrix, 1e-10) if rank == 0 else None)
    assert torch.equal(solution.value, b / 2)
    assert world == 3


def _different(rank: int, world: int) -> None:
    case = Case("log", 1, "hodlr", 60, torch.float64, 1e-6, seed=rank)
    with pytest.raises(RankError, match=f"rank {world - 1} has another matrix"):
        Distributed.of(case.matrix)
    one = Distributed.of(Case("log", 1, "hodlr", 60, torch.float64, 1e-6, 0).matrix)
    with pytest.raises(ArgumentError, match="for 60 equations"):
        one.apply(torch.ones(59))
    b = torch.ones(60, dtype=torch.float64)
    with pytest.raises(ArgumentError if rank == 0 else RankError, match=r"factors|another rank"):
        one.solve(b, None)
    with pytest.raises(ArgumentError if rank else RankError, match=r"not finite|another rank"):
        one.solve(b * (math.nan if rank else 1.0), lu(case.matrix, 1e-6))


def _bytes(matrix: HMatrix) -> list[int]:
    return [
        sum(t.numel() * t.element_size() for t in vars(p.block).values() if t is not None)
        for p in placed(matrix.root)
    ]


@pytest.mark.distributed
@pytest.mark.parametrize("world", [2, 3])
def test_products_and_systems(tmp_path: Path, world: int) -> None:
    on_ranks(tmp_path, world, _products_and_systems, world)


@pytest.mark.distributed
def test_a_rank_without_blocks(tmp_path: Path) -> None:
    on_ranks(tmp_path, 3, _idle, 3)


@pytest.mark.distributed
def test_more_ranks_than_leaves(tmp_path: Path) -> None:
    on_ranks(tmp_path, 4, _few_leaves, 4)


@pytest.mark.distributed
def test_ranks_that_differ_are_told(tmp_path: Path) -> None:
    on_ranks(tmp_path, 2, _different, 2)


def test_shares_are_those_of_the_longest_first() -> None:
    matrix = CASES[0].matrix
    for world in (1, 2, 3, 7):
        found = owners(matrix.root, world)
        costs = _bytes(matrix)
        loads = [sum(c for c, o in zip(costs, found, strict=True) if o == r) for r in range(world)]
        assert sum(loads) == sum(costs)
        assert max(loads) <= 4 / 3 * max(sum(costs) / world, max(costs)) + max(costs)
