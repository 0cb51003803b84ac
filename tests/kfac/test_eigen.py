"""Exact damping in the eigenbasis."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from graphopt.runtime.kfac.eigen import Eigen
from graphopt.runtime.kfac.solve import Problem
from tests.kfac.curvature_problems import dense, gradient, layouts, moment

NotConverged = torch.linalg.LinAlgError


@pytest.mark.parametrize("layout", layouts())
def test_equals_a_dense_solve(layout: str) -> None:
    problem, (groups, rows, columns) = layouts()[layout]
    (solution,) = Eigen().solve([problem], 0.03)
    assert solution is not None
    some = gradient(groups, rows, columns)
    found = Eigen().apply(solution, some)
    for group in range(groups):
        product = torch.kron(
            dense(problem.left, group, groups), dense(problem.right, group, groups)
        )
        product += 0.03 * torch.eye(rows * columns, dtype=torch.float64)
        expected = torch.linalg.solve(product, some[group].flatten())
        torch.testing.assert_close(found[group].flatten(), expected)


def test_negative_eigenvalues_count_as_zero() -> None:
    left = torch.diag(torch.tensor([-1e-3, 2.0], dtype=torch.float64))[None]
    right = torch.ones(1, 1, dtype=torch.float64)
    (solution,) = Eigen().solve([Problem("w", left, right)], 1e-3)
    assert solution is not None
    found = Eigen().apply(solution, torch.ones(1, 2, 1, dtype=torch.float64))
    torch.testing.assert_close(found.flatten().tolist(), [1e3, 1 / 2.001])


def _failing(monkeypatch: pytest.MonkeyPatch, fails: Tensor, times: int) -> None:
    """Makes eigh fail as often as asked on whatever batch holds this matrix."""
    original, left = torch.linalg.eigh, [times]

    def eigh(matrices: Tensor) -> tuple[Tensor, Tensor]:
        same = matrices.shape[1:] == fails.shape and torch.isclose(matrices, fails).all((1, 2))
        if torch.as_tensor(same).any() and left[0] > 0:
            left[0] -= 1
            raise NotConverged("did not converge")
        return original(matrices)

    monkeypatch.setattr(torch.linalg, "eigh", eigh)


@pytest.mark.parametrize("times", [1, 3])
def test_what_does_not_converge_is_tried_again(monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    problems = [Problem("w", moment(2, 3, seed), moment(1, 6, seed)) for seed in (1, 2)]
    expected = Eigen().solve(problems, 1e-2)
    _failing(monkeypatch, problems[0].left[1], times)
    for before, after in zip(expected, Eigen().solve(problems, 1e-2), strict=True):
        assert before is not None
        assert after is not None
        some = gradient(1, 6, 6)
        torch.testing.assert_close(Eigen().apply(after, some), Eigen().apply(before, some))


def test_what_never_converges_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    problems = [Problem("w", moment(1, 3, seed), moment(1, 4, seed)) for seed in (1, 2)]
    _failing(monkeypatch, problems[0].left[0], 1000)
    found = Eigen().solve(problems, 1e-2)
    assert found[0] is None
    assert found[1] is not None
