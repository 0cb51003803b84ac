"""Packed symmetric matrices."""

from __future__ import annotations

import pytest
import torch

from graphopt.errors import ArgumentError
from graphopt.runtime.kfac import packing
from graphopt.runtime.kfac.packing import frobenius, pack, packed_size, unpack
from tests.kfac.curvature_problems import moment


def test_order_is_the_lower_triangle_row_by_row() -> None:
    full = torch.tensor([[[1.0, 9.0, 9.0], [2.0, 3.0, 9.0], [4.0, 5.0, 6.0]]])
    assert pack(full).tolist() == [[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]]
    assert unpack(pack(full))[0].tolist() == [[1.0, 2.0, 4.0], [2.0, 3.0, 5.0], [4.0, 5.0, 6.0]]


@pytest.mark.parametrize("size", [2, 7])
def test_large_matrices_without_kept_places(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    full = moment(3, size)
    expected = pack(full)
    monkeypatch.setattr(packing, "_LARGEST_CACHED", 1)
    assert torch.equal(pack(full), expected)
    assert torch.equal(unpack(expected), full)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_dtype_stays(dtype: torch.dtype) -> None:
    full = moment(2, 3, dtype=dtype)
    assert pack(full).dtype == unpack(pack(full)).dtype == dtype
    assert torch.equal(unpack(pack(full)), full)


def test_norm_of_large_float32_numbers_does_not_overflow() -> None:
    full = torch.full((1, 4, 4), 1e30)
    assert frobenius(pack(full)).item() == pytest.approx(4e30, rel=1e-6)


def test_size_of_packed_matrices() -> None:
    assert packed_size(torch.zeros(2, 4608 * 4609 // 2, device="meta")) == 4608


@pytest.mark.parametrize("shape", [(2, 3, 4), (3, 3)])
def test_only_square_matrices_are_packed(shape: tuple[int, ...]) -> None:
    with pytest.raises(ArgumentError, match="cannot pack"):
        pack(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(2, 5), (2, 0), (6,)])
def test_only_triangles_are_unpacked(shape: tuple[int, ...]) -> None:
    with pytest.raises(ArgumentError, match="does not hold packed matrices"):
        unpack(torch.zeros(shape))
