"""Exact products of int16 matrices, and what they say about products of flex tensors."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from graphopt.errors import ArgumentError
from graphopt.ops import int16_mm
from tests.support.flex import exponent

ops = torch.ops.graphopt
integers = st.integers(-(2**15), 2**15 - 1)
extremes = st.sampled_from([-(2**15), -(2**15) + 1, -129, -128, -1, 0, 127, 128, 255, 2**15 - 1])
sizes = st.integers(1, 6)


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    m, k, n = draw(sizes), draw(sizes), draw(sizes)
    element = integers | extremes
    left = draw(st.lists(element, min_size=m * k, max_size=m * k))
    right = draw(st.lists(element, min_size=k * n, max_size=k * n))
    return tuple(
        torch.tensor(values, dtype=torch.int16).view(shape)
        for values, shape in ((left, (m, k)), (right, (k, n)))
    )


@given(pairs())
def test_products_are_those_of_integers(matrices: tuple[Tensor, Tensor]) -> None:
    a, b = matrices
    columns = b.t().tolist()
    wanted = [
        [sum(x * y for x, y in zip(row, c, strict=True)) for c in columns] for row in a.tolist()
    ]
    assert ops.int16_mm(a, b).tolist() == wanted
    assert ops.int16_mm(a.t().contiguous().t(), b.t().contiguous().t()).tolist() == wanted


@given(pairs(), st.integers(0, 2**31))
def test_the_order_and_the_grouping_of_terms_do_not_matter(
    matrices: tuple[Tensor, Tensor], seed: int
) -> None:
    a, b = matrices
    order = torch.randperm(a.shape[1], generator=torch.Generator().manual_seed(seed))
    wanted = ops.int16_mm(a, b)
    assert torch.equal(ops.int16_mm(a[:, order], b[order]), wanted)
    middle = a.shape[1] // 2
    parts = ops.int16_mm(a[:, :middle], b[:middle]) + ops.int16_mm(a[:, middle:], b[middle:])
    assert torch.equal(parts, wanted)


def test_the_largest_sums_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    terms = 2**20 + 3
    least = torch.full((1, terms), -(2**15), dtype=torch.int16)
    assert ops.int16_mm(least, least.t()).item() == terms << 30
    least[0, 0] = 1  # the last bit of a sum of 2^50
    wanted = ((terms - 1) << 30) + 1
    assert ops.int16_mm(least, least.t()).item() == wanted
    # More terms than float64 is exact for are summed in parts.
    monkeypatch.setattr(int16_mm, "EXACT_IN_DOUBLE", 1000)
    assert ops.int16_mm(least, least.t()).item() == wanted


floats = st.floats(-1e3, 1e3, width=32)


@given(
    st.lists(st.tuples(floats, floats), min_size=1, max_size=30),
    st.integers(-6, 6),
    st.integers(-6, 6),
)
def test_a_dot_product_is_within_the_bound(
    values: list[tuple[float, float]], e_x: int, e_y: int
) -> None:
    """Half a unit of each times the size of the other, and a quarter of both per term."""
    x, y = torch.tensor(values).unbind(1)
    x_mantissas, x_statistics = ops.flex_quantise(x, exponent(e_x), 16)
    y_mantissas, y_statistics = ops.flex_quantise(y, exponent(e_y), 16)
    if x_statistics[1] or y_statistics[1]:
        return
    product = ops.int16_mm(x_mantissas[None], y_mantissas[:, None]).item()
    found = product * Fraction(2) ** (e_x + e_y)
    exact = [(Fraction(a), Fraction(b)) for a, b in values]
    error = abs(found - sum(a * b for a, b in exact))
    unit_x, unit_y = Fraction(2) ** e_x, Fraction(2) ** e_y
    assert error <= (
        unit_y / 2 * sum(abs(a) for a, _ in exact)
        + unit_x / 2 * sum(abs(b) for _, b in exact)
        + len(exact) * unit_x * unit_y / 4
    )


def test_empty_and_traced() -> None:
    empty = torch.zeros(3, 0, dtype=torch.int16)
    assert ops.int16_mm(empty, empty.t()).tolist() == [[0] * 3] * 3
    assert ops.int16_mm(empty.t(), empty).shape == (0, 0)
    a, b = torch.ones(2, 3, dtype=torch.int16), torch.ones(3, 4, dtype=torch.int16)
    torch.library.opcheck(ops.int16_mm.default, (a, b))


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (torch.ones(2, 2), torch.ones(2, 2).short(), "not torch.float32 with torch.int16"),
        (torch.ones(2, 3).short(), torch.ones(2, 3).short(), "cannot multiply (2, 3) on cpu"),
        (torch.ones(3).short(), torch.ones(3, 1).short(), "cannot multiply (3,) on cpu"),
    ],
)
def test_bad_input(a: Tensor, b: Tensor, message: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        ops.int16_mm(a, b)
    assert message in str(caught.value)
    assert caught.value.hint
