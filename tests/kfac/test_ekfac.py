"""EKFAC against its definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from graphopt.errors import ArgumentError
from graphopt.runtime.kfac import ekfac
from graphopt.runtime.kfac.eigen import Eigen
from graphopt.runtime.kfac.ekfac import Ekfac
from graphopt.runtime.kfac.solve import Problem
from tests.kfac.curvature_problems import dense, diagonal_moment, gradient, layouts, moment

DAMPING = 0.02


def _samples(
    examples: int, positions: int, rows: int, columns: int, seed: int
) -> tuple[Tensor, Tensor]:
    return gradient(examples, positions, rows, seed), gradient(examples, positions, columns, -seed)


def _gradients(samples: tuple[tuple[Tensor, Tensor], ...]) -> Tensor:
    """The gradient of each example, ``[n, rows, columns]``."""
    return sum((torch.einsum("nrp,nrq->npq", g, a) for g, a in samples), start=torch.zeros(()))


def _definition(problem: Problem, some: Tensor) -> Tensor:
    """Preconditions by the dense matrix in the basis of Kronecker products of eigenvectors."""
    bases = [torch.linalg.eigh(dense(side))[1] for side in (problem.left, problem.right)]
    basis = torch.kron(*bases)
    each = _gradients(problem.samples).flatten(1) @ basis
    curvature = basis @ torch.diag(each.square().mean(0)) @ basis.mT
    damped = curvature + DAMPING * torch.eye(len(basis), dtype=torch.float64)
    return torch.linalg.solve(damped, some.flatten()).view_as(some)


@pytest.mark.parametrize("chunk", [1, 24, 2**22])
@pytest.mark.parametrize("uses", [(1,), (3,), (2, 1), (1, 1)])
def test_equals_the_definition(
    monkeypatch: pytest.MonkeyPatch, uses: tuple[int, ...], chunk: int
) -> None:
    monkeypatch.setattr(ekfac, "_CHUNK", chunk)
    samples = tuple(_samples(7, r, 4, 3, 10 + i) for i, r in enumerate(uses))
    problem = Problem("w", moment(1, 4, 1), moment(1, 3, 2), samples)
    (solution,) = Ekfac().solve([problem], DAMPING)
    assert solution is not None
    some = gradient(1, 4, 3)
    torch.testing.assert_close(Ekfac().apply(solution, some), _definition(problem, some))


@pytest.mark.parametrize(
    "sides",
    [
        (moment(2, 2, 3), moment(3, 2, 4)),
        (moment(1, 4, 5), diagonal_moment(1, 6, 6)),
        (diagonal_moment(2, 2, 7), moment(1, 6, 8)),
    ],
)
def test_sides_in_pieces_and_diagonal_sides(sides: tuple[Tensor, Tensor]) -> None:
    problem = Problem("w", *sides, (_samples(5, 2, 4, 6, 21),))
    (solution,) = Ekfac().solve([problem], DAMPING)
    assert solution is not None
    # A basis of distinct eigenvalues is unique but for signs, which S does not see, and for the
    # order of a diagonal side, which permutes S and basis together.
    some = gradient(1, 4, 6)
    torch.testing.assert_close(Ekfac().apply(solution, some), _definition(problem, some))


def test_one_datum_gives_its_own_moments() -> None:
    outer, inner = _samples(1, 1, 4, 3, 30)
    left = torch.einsum("nrp,nrq->pq", outer, outer)[None]
    right = torch.einsum("nrp,nrq->pq", inner, inner)[None]
    problem = Problem("w", left, right, ((outer, inner),))
    (solution,) = Ekfac().solve([problem], DAMPING)
    assert solution is not None
    each = (outer[0].mT @ inner[0]).flatten()
    fisher = torch.outer(each, each) + DAMPING * torch.eye(12, dtype=torch.float64)
    some = gradient(1, 4, 3)
    expected = torch.linalg.solve(fisher, some.flatten()).view_as(some)
    torch.testing.assert_close(Ekfac().apply(solution, some), expected)


@pytest.mark.parametrize("layout", layouts())
def test_without_samples_it_is_the_eigenbasis(layout: str) -> None:
    problem, shape = layouts()[layout]
    (found,), (expected,) = Ekfac().solve([problem], DAMPING), Eigen().solve([problem], DAMPING)
    assert found is not None
    assert expected is not None
    some = gradient(*shape)
    assert torch.equal(Ekfac().apply(found, some), Eigen().apply(expected, some))


def test_no_examples_is_no_samples() -> None:
    empty = (torch.zeros(0, 2, 4), torch.zeros(0, 2, 3))
    (solution,) = Ekfac().solve([Problem("w", moment(1, 4), moment(1, 3), (empty,))], DAMPING)
    assert solution is not None
    assert "moments" not in solution


def test_samples_that_are_not_finite_are_none() -> None:
    outer, inner = _samples(3, 1, 4, 3, 40)
    inner[1, 0, 2] = torch.nan
    problem = Problem("w", moment(1, 4), moment(1, 3), ((outer, inner),))
    assert Ekfac().solve([problem], DAMPING) == [None]


@pytest.mark.parametrize(
    "samples",
    [
        (_samples(3, 1, 4, 3, 1), _samples(2, 1, 4, 3, 2)),
        ((gradient(3, 2, 4), gradient(3, 1, 3)),),
        (_samples(3, 1, 4, 2, 1),),
        (_samples(3, 1, 5, 3, 1),),
    ],
)
def test_samples_that_do_not_fit(samples: tuple[tuple[Tensor, Tensor], ...]) -> None:
    with pytest.raises(ArgumentError):
        Ekfac().solve([Problem("w", moment(1, 4), moment(1, 3), samples)], DAMPING)
