"""Magnitudes are counted as a loop over the elements counts them."""

from __future__ import annotations

import math
from fractions import Fraction

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from graphopt.calibration.ranges import RangeCounter
from graphopt.calibration.record import Range

FLOATS = st.floats(width=32, allow_nan=True, allow_infinity=True)


def _counted(*tensors: torch.Tensor) -> Range:
    counter = RangeCounter()
    for tensor in tensors:
        counter.add(tensor)
    return counter.found()


def _significant_bits(value: float) -> int:
    numerator = abs(Fraction(value).numerator)
    return len(bin(numerator).rstrip("0")) - 2


@given(st.lists(FLOATS, max_size=30))
def test_counts_are_those_of_a_loop(values: list[float]) -> None:
    found = _counted(torch.tensor(values, dtype=torch.float32))
    finite = [v for v in values if math.isfinite(v)]
    nonzero = [v for v in finite if v]
    assert found.elements == len(values)
    assert found.nan == sum(map(math.isnan, values))
    assert found.infinite == sum(map(math.isinf, values))
    assert found.zeros == len(finite) - len(nonzero)
    binades = [math.frexp(v)[1] - 1 for v in nonzero]
    assert found.binades == {str(e): binades.count(e) for e in sorted(set(binades))}
    if nonzero:
        assert found.log2_amax == pytest.approx(math.log2(max(map(abs, nonzero))))
        for name, bits in (("bf16", 8), ("fp16", 11)):
            over = sum(_significant_bits(v) > bits for v in nonzero)
            assert found.inexact[name] == pytest.approx(over / len(nonzero))
    else:
        assert found.log2_amax is None


def test_several_batches_add_up() -> None:
    one, two = torch.randn(7, 3), 100 * torch.randn(4)
    assert _counted(one, two) == _counted(torch.cat([one.flatten(), two]))


def test_shares_below_a_power_of_two() -> None:
    found = _counted(torch.tensor([0.0, 1.0, 1.0, 0.25, -0.25, 2.0**-30]))
    assert found.share_below(0) == pytest.approx(3 / 5)
    assert found.share_below(-20) == pytest.approx(1 / 5)
    mass = 2 + 0.5 + 2.0**-30
    assert found.mass_below(0) == pytest.approx((0.5 + 2.0**-30) / mass)
    assert found.mass_below(-150) == 0


@pytest.mark.parametrize("value", [torch.zeros(3), torch.empty(0), torch.full((2,), math.nan)])
def test_without_a_magnitude(value: torch.Tensor) -> None:
    found = _counted(value)
    assert found.log2_amax is None
    assert found.share_below(10) == found.mass_below(10) == 0
