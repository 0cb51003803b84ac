"""Closed form of the 2 x 2 blocks of a norm."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from graphopt.errors import ArgumentError
from graphopt.runtime.kfac.packing import pack, unpack
from graphopt.runtime.kfac.unitwise import apply, solve, solve_all
from tests.kfac.curvature_problems import moment


def _gradients(channels: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    both = torch.randn(2, channels, generator=torch.Generator().manual_seed(5), dtype=dtype)
    return both[0], both[1]


@pytest.mark.parametrize("rows", [1, 6])
def test_equals_a_dense_solve(rows: int) -> None:
    blocks = moment(8, 2, rows=rows)
    solution = solve(pack(blocks), 1e-2)
    assert solution is not None
    scale, shift = _gradients(8)
    expected = torch.linalg.solve(
        blocks + 1e-2 * torch.eye(2, dtype=torch.float64), torch.stack([scale, shift], 1)
    )
    found = apply(solution, scale, shift)
    torch.testing.assert_close(found[0], expected[:, 0])
    torch.testing.assert_close(found[1], expected[:, 1])


def test_one_parameter() -> None:
    solution = solve(torch.tensor([[3.0], [0.0]]), 0.5)
    assert solution is not None
    found, nothing = apply(solution, torch.tensor([7.0, 1.0]))
    assert nothing is None
    assert found.tolist() == [2.0, 2.0]


def test_shapes_and_dtypes_of_gradients_stay() -> None:
    solution = solve(torch.ones(6, 3, dtype=torch.bfloat16), 0.1)
    assert solution is not None
    assert solution["inverse"].dtype is torch.float32
    scale = torch.ones(2, 3, dtype=torch.bfloat16)
    found, other = apply(solution, scale, scale.double())
    assert other is not None
    assert (found.shape, found.dtype) == ((2, 3), torch.bfloat16)
    assert (other.shape, other.dtype) == ((2, 3), torch.float64)


def test_a_small_determinant_of_large_moments_in_float32() -> None:
    # The product of 1e6 with itself is a multiple of 65536 in float32; the determinant is 126998.
    moments = torch.tensor([[1e6, 1e6 - 0.0625, 1e6]])
    solution = solve(moments, 1e-3)
    assert solution is not None
    damped = unpack(moments)[0].double() + 1e-3 * torch.eye(2, dtype=torch.float64)
    expected = torch.linalg.inv(damped)[None]
    torch.testing.assert_close(solution["inverse"].double(), pack(expected), rtol=1e-5, atol=0)


def test_a_correlation_rounded_to_above_one_counts_as_one() -> None:
    # As sent in bfloat16: without the cut the inverse would have an eigenvalue of about -50.
    found, expected = (solve(torch.tensor([[1.0, q, 1.0]]), 1e-4) for q in (1.0078125, 1.0))
    assert found is not None
    assert expected is not None
    assert torch.equal(found["inverse"], expected["inverse"])
    assert torch.linalg.eigvalsh(unpack(found["inverse"]).double()).min() > 0.4


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("columns", [1, 3])
def test_not_finite_is_none(bad: float, columns: int) -> None:
    moments = torch.ones(4, columns)
    assert solve(moments, 1e-3) is not None
    moments[2, 0] = bad
    assert solve(moments, 1e-3) is None


def test_zero_gradients_leave_the_damping() -> None:
    solution = solve(torch.zeros(2, 3), 0.5)
    assert solution is not None
    assert solution["inverse"].tolist() == [[2.0, 0.0, 2.0]] * 2


def test_bad_input() -> None:
    with pytest.raises(ArgumentError, match="unit-wise moments"):
        solve(torch.ones(4, 2), 1e-3)
    with pytest.raises(ArgumentError, match="damping=0"):
        solve(torch.ones(4, 3), 0)
    solution = solve(torch.ones(4, 3), 1e-3)
    assert solution is not None
    for first, second in ((torch.ones(4), None), (torch.ones(3), torch.ones(3))):
        with pytest.raises(ArgumentError, match="do not fit"):
            apply(solution, first, second)


def test_several_norms_are_as_one_by_one() -> None:
    torch.manual_seed(0)
    rows = [torch.randn(c, 3).abs() for c in (4, 2)] + [torch.rand(5, 1)]
    moments = [rows[0], rows[2], rows[1], torch.full((2, 3), float("nan")), rows[0].double()]
    together = solve_all(moments, 1e-2)
    for each, found in zip(moments, together, strict=True):
        alone = solve(each, 1e-2)
        assert (alone is None) == (found is None)
        if alone is not None and found is not None:
            assert torch.equal(found["inverse"], alone["inverse"])
            assert found["inverse"].dtype is alone["inverse"].dtype
            # Memory of its own, as each is kept and replaced alone.
            assert found["inverse"].untyped_storage().nbytes() == found["inverse"].nbytes
            assert float(found["damping"]) == 1e-2
