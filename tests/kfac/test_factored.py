"""Factored damping, its escalation, and what all solvers share."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from graphopt.errors import ArgumentError
from graphopt.runtime.kfac import solve as shared
from graphopt.runtime.kfac.factored import Factored
from graphopt.runtime.kfac.lowrank import LowRank
from graphopt.runtime.kfac.solve import Problem, in_batches, solver
from tests.kfac.curvature_problems import dense, diagonal_moment, gradient, layouts, moment

NAMES = ["factored", "eigen", "ekfac", "lowrank"]


def _mean_trace(side: Tensor) -> float:
    return float(dense(side).diagonal().mean())


@pytest.mark.parametrize("layout", layouts())
def test_equals_a_dense_solve_of_the_damped_product(layout: str) -> None:
    problem, (groups, rows, columns) = layouts()[layout]
    damping = 0.03
    (solution,) = Factored().solve([problem], damping)
    assert solution is not None
    some = gradient(groups, rows, columns)
    found = Factored().apply(solution, some)
    ratio = math.sqrt(_mean_trace(problem.right) / _mean_trace(problem.left))
    for group in range(groups):
        left, right = dense(problem.left, group, groups), dense(problem.right, group, groups)
        left += math.sqrt(damping) / ratio * torch.eye(rows, dtype=torch.float64)
        right += math.sqrt(damping) * ratio * torch.eye(columns, dtype=torch.float64)
        # The row-major order of M's elements belongs to the product with G first.
        expected = torch.linalg.solve(torch.kron(left, right), some[group].flatten())
        torch.testing.assert_close(found[group].flatten(), expected)


@pytest.mark.parametrize("factor", [1e-6, 1e-3, 7.0, 1e5])
def test_moving_a_factor_between_the_sides_changes_nothing(factor: float) -> None:
    left, right, some = moment(1, 4, 1), moment(1, 3, 2), gradient(1, 4, 3)
    first, second = Factored().solve(
        [Problem("a", left, right), Problem("b", left / factor, right * factor)], 1e-3
    )
    assert first is not None
    assert second is not None
    torch.testing.assert_close(Factored().apply(second, some), Factored().apply(first, some))


@pytest.mark.parametrize("name", NAMES)
def test_together_is_as_one_by_one(name: str) -> None:
    problems = [problem for problem, _ in layouts().values()]
    problems += [Problem("more", moment(2, 3, 31), moment(1, 6, 32))] * 2
    shapes = [shape for _, shape in layouts().values()] + [(1, 6, 6)] * 2
    some = solver(name)
    together = some.solve(problems, 1e-2)
    for problem, shape, solution in zip(problems, shapes, together, strict=True):
        (alone,) = some.solve([problem], 1e-2)
        assert solution is not None
        assert alone is not None
        assert solution.keys() == alone.keys()
        torch.testing.assert_close(
            some.apply(solution, gradient(*shape)), some.apply(alone, gradient(*shape))
        )


@pytest.mark.parametrize("name", NAMES)
def test_one_bad_block_spoils_no_other(name: str) -> None:
    broken = moment(1, 3, 1)
    broken[0, 1, 1] = math.nan
    endless = diagonal_moment(1, 3, 2)
    endless[0, 2] = math.inf
    good = Problem("good", moment(1, 3, 3), moment(1, 3, 4))
    found = solver(name).solve(
        [Problem("a", broken, good.right), good, Problem("b", good.left, endless)], 1e-3
    )
    assert found[0] is None
    assert found[2] is None
    (alone,) = solver(name).solve([good], 1e-3)
    assert found[1] is not None
    assert alone is not None
    assert all(torch.equal(found[1][key], value) for key, value in alone.items())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("zero", ["left", "right", "both"])
def test_zero_statistics_stay_finite(name: str, zero: str) -> None:
    left = moment(1, 3, 1) * (zero == "right")
    right = moment(1, 4, 2) * (zero == "left")
    (solution,) = solver(name).solve([Problem("w", left, right)], 0.25)
    assert solution is not None
    assert solution["damping"].item() == 0.25
    found = solver(name).apply(solution, gradient(1, 3, 4))
    assert found.isfinite().all()
    if zero == "both":
        torch.testing.assert_close(found, gradient(1, 3, 4) / 0.25)


def test_an_indefinite_block_gets_more_damping_and_no_other_does() -> None:
    indefinite = torch.tensor([[[0.0, 2.0], [2.0, 0.0]]], dtype=torch.float64)
    one = torch.eye(2, dtype=torch.float64)[None]
    first, second = Factored().solve(
        [Problem("indefinite", indefinite, one), Problem("good", one, one)], 1e-3
    )
    assert first is not None
    assert second is not None
    # The trace is zero, so √λ itself is added: it first exceeds 2 at λ = 10.
    assert first["damping"].item() == pytest.approx(10.0)
    expected = torch.linalg.inv(indefinite + math.sqrt(10) * one)
    torch.testing.assert_close(first["left_inverse"], expected)
    assert second["damping"].item() == 1e-3


def test_a_pivot_of_zero_gets_more_damping() -> None:
    # √λ = 1 makes the left side exactly singular.
    left = torch.diag(torch.tensor([-1.0, 1.0]))[None]
    (solution,) = Factored().solve([Problem("w", left, torch.zeros(1, 2, 2))], 1.0)
    assert solution is not None
    assert solution["damping"].item() == 10.0


def test_a_singular_block_needs_no_more_damping() -> None:
    (solution,) = Factored().solve([Problem("w", moment(1, 8, rows=1), moment(1, 3))], 1e-3)
    assert solution is not None
    assert solution["damping"].item() == 1e-3


@pytest.mark.parametrize("form", ["dense", "diagonal"])
def test_gives_up_after_six_escalations(form: str) -> None:
    def negative(value: float) -> Tensor:
        diagonal = torch.tensor([[-value, value]], dtype=torch.float64)
        return diagonal if form == "diagonal" else torch.diag_embed(diagonal)

    one = torch.eye(2, dtype=torch.float64)[None]
    problems = [Problem("w", negative(value), one) for value in (31.0, 32.0)]
    # √(1e-3 * 10⁶) = 31.6 is the most that is added.
    last, none = Factored().solve(problems, 1e-3)
    assert last is not None
    assert last["damping"].item() == pytest.approx(1e3)
    assert none is None


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("stored", "computed"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_precision(name: str, stored: torch.dtype, computed: torch.dtype) -> None:
    problem = Problem("w", moment(1, 3, 1, dtype=stored), moment(1, 4, 2, dtype=stored))
    before = problem.left.clone()
    (solution,) = solver(name).solve([problem], 1e-2)
    assert solution is not None
    kinds = {value.dtype for key, value in solution.items() if key != "damping"}
    assert kinds == {computed}
    assert torch.equal(problem.left, before)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        found = solver(name).apply(solution, gradient(1, 3, 4).to(dtype))
        assert found.dtype is dtype
        assert found.is_contiguous()


@pytest.mark.parametrize("name", NAMES)
def test_bad_input(name: str) -> None:
    some = solver(name)
    problem = Problem("layer.weight", moment(2, 3), moment(1, 4))
    for damping in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ArgumentError, match="is not a positive number"):
            some.solve([problem], damping)
    with pytest.raises(ArgumentError, match=r"layer\.weight"):
        some.solve([Problem("layer.weight", torch.ones(1, 2, 3), torch.ones(1, 2))], 1e-3)
    (solution,) = some.solve([problem], 1e-3)
    assert solution is not None
    for shape in ((1, 5, 4), (1, 8, 4), (1, 6, 5), (3, 2, 4)):
        with pytest.raises(ArgumentError):
            some.apply(solution, gradient(*shape))


def test_no_problems_no_solutions() -> None:
    assert [solver(name).solve([], 1e-3) for name in NAMES] == [[]] * 4


def test_unknown_solver() -> None:
    with pytest.raises(ArgumentError, match="there is no solver 'newton'"):
        solver("newton")
    with pytest.raises(ArgumentError, match="rank=0"):
        LowRank(rank=0)


def test_batches_are_bounded_and_shares_own_their_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared, "_BATCH_ELEMENTS", 20)
    seen = []

    def compute(matrices: Tensor) -> tuple[Tensor]:
        seen.append(tuple(matrices.shape))
        return (matrices.mul_(2),)

    items = [(torch.full((n, d, d), float(n)),) for n, d in ((1, 3), (2, 2), (1, 3), (1, 3))]
    found = in_batches(items, compute)
    assert sorted(seen) == [(1, 3, 3), (2, 2, 2), (2, 3, 3)]
    for (item,), (share,) in zip(items, found, strict=True):
        assert torch.equal(share, 2 * item)
        assert share.untyped_storage().nbytes() == share.numel() * 4
