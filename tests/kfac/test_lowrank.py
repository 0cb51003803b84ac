"""Low rank plus a multiple of the identity."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from graphopt.runtime.kfac import lowrank
from graphopt.runtime.kfac.factored import Factored
from graphopt.runtime.kfac.lowrank import LowRank, leading_pairs, woodbury
from graphopt.runtime.kfac.solve import Problem, Solution
from tests.kfac.curvature_problems import diagonal_moment, gradient, moment


def _with_spectrum(values: Tensor, blocks: int = 1, seed: int = 3) -> Tensor:
    size = len(values)
    basis = torch.linalg.qr(gradient(blocks, size, size, seed)).Q
    return basis @ torch.diag(values) @ basis.mT


def _inverse(solution: Solution) -> Tensor:
    basis, weights = solution["basis"], solution["weights"]
    identity = torch.eye(basis.shape[1], dtype=basis.dtype)
    return (
        basis @ torch.diag_embed(weights) @ basis.mT + solution["scale"][:, None, None] * identity
    )


def test_full_rank_is_the_inverse() -> None:
    matrices = moment(2, 6)
    found = _inverse(woodbury(leading_pairs(matrices, 6), torch.tensor(0.01)))
    expected = torch.linalg.inv(matrices + 0.01 * torch.eye(6, dtype=torch.float64))
    torch.testing.assert_close(found, expected)


def test_exact_where_the_rest_is_a_multiple_of_the_identity() -> None:
    values = torch.tensor([9.0, 5.0, 3.0] + [0.01] * 37, dtype=torch.float64)
    matrices = _with_spectrum(values, blocks=2)
    pairs = leading_pairs(matrices, 3)
    torch.testing.assert_close(pairs[0], values[:3].flip(0).expand(2, 3), rtol=1e-6, atol=1e-6)
    found = _inverse(woodbury(pairs, torch.tensor(0.1)))
    expected = torch.linalg.inv(matrices + 0.1 * torch.eye(40, dtype=torch.float64))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_the_trace_is_kept() -> None:
    matrices = moment(3, 20)
    values, _, rest = leading_pairs(matrices, 4)
    expected = matrices.diagonal(dim1=1, dim2=2).sum(1)
    torch.testing.assert_close(values.sum(1) + 16 * rest, expected)


def test_small_error_on_decaying_spectra_and_smaller_with_more_rank() -> None:
    values = 1 / torch.arange(1, 101, dtype=torch.float64) ** 2
    problem = Problem("w", _with_spectrum(values), _with_spectrum(values, seed=4))
    (exact,) = Factored().solve([problem], 1e-3)
    assert exact is not None
    some = gradient(1, 100, 100)
    expected = Factored().apply(exact, some)
    errors = []
    for rank in (3, 8, 20):
        (solution,) = LowRank(rank=rank).solve([problem], 1e-3)
        assert solution is not None
        assert {key for key in solution if key.startswith("left")} == {
            *("left_basis", "left_weights", "left_scale")
        }
        error = LowRank(rank=rank).apply(solution, some) - expected
        errors.append(float(error.norm() / expected.norm()))
    assert errors[0] > 2 * errors[1] > 4 * errors[2]
    assert errors[2] < 0.03


@pytest.mark.parametrize("groups", [1, 2])
def test_reduced_sides_in_pieces_beside_exact_ones(groups: int) -> None:
    values = torch.tensor([4.0, 2.0] + [0.02] * 10, dtype=torch.float64)
    left = _with_spectrum(values, blocks=2 * groups)
    for right in (moment(groups, 5), diagonal_moment(groups, 5), moment(groups, 8, rows=2)):
        problem = Problem("w", left, right)
        (found,) = LowRank(rank=2).solve([problem], 1e-2)
        (expected,) = Factored().solve([problem], 1e-2)
        assert found is not None
        assert expected is not None
        assert "left_basis" in found
        assert torch.equal(found["right_inverse"], expected["right_inverse"])
        some = gradient(groups, 24, right.shape[1])
        torch.testing.assert_close(
            LowRank(rank=2).apply(found, some),
            Factored().apply(expected, some),
            rtol=1e-3,
            atol=1e-2,
        )


def test_sizes_up_to_four_ranks_are_exact() -> None:
    problem = Problem("w", moment(1, 8), moment(1, 9))
    (solution,) = LowRank(rank=2).solve([problem], 1e-2)
    assert solution is not None
    assert "left_inverse" in solution
    assert "right_basis" in solution


def test_escalation_keeps_the_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(matrices: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        calls.append(matrices.shape)
        return leading_pairs(matrices, rank)

    monkeypatch.setattr(lowrank, "leading_pairs", counted)
    indefinite = torch.tensor([[[0.0, 2.0], [2.0, 0.0]]], dtype=torch.float64)
    (solution,) = LowRank(rank=2).solve([Problem("w", indefinite, moment(1, 12))], 1e-3)
    assert solution is not None
    assert solution["damping"].item() == pytest.approx(10.0)
    assert len(calls) == 1


def test_the_same_every_time() -> None:
    problem = Problem("w", moment(1, 30), moment(1, 40))
    torch.manual_seed(1)
    (first,) = LowRank(rank=4).solve([problem], 1e-2)
    state = torch.get_rng_state()
    (second,) = LowRank(rank=4).solve([problem], 1e-2)
    assert torch.equal(torch.get_rng_state(), state)
    assert first is not None
    assert second is not None
    assert all(torch.equal(second[key], value) for key, value in first.items())
