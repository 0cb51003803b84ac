"""Bounds on the error of flex tensors, on generated tensors."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import graphopt.ops  # noqa: F401  (registers the operators)
from graphopt.ops.flex import UNKNOWN, largest_mantissa
from tests.support.flex import exponent

flex = torch.ops.graphopt
mantissas = st.integers(8, 16)
exponents = st.integers(-126, 126)
anything = st.lists(st.floats(width=32), max_size=20).map(lambda values: torch.tensor(values))
finite = st.lists(
    st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=20
).map(lambda values: torch.tensor(values))


def rounded(x: Tensor, e: int, mantissa: int) -> Tensor:
    """In float64, in which every result is exact."""
    found, _ = flex.flex_quantise(x, exponent(e), mantissa)
    return found.double() * 2.0**e


@given(finite, exponents, mantissas)
def test_an_error_is_half_a_unit_or_what_saturated(x: Tensor, e: int, mantissa: int) -> None:
    unit, limit = 2.0**e, largest_mantissa(mantissa)
    error = (rounded(x, e, mantissa) - x.double()).abs()
    inside = x.double().abs() <= limit * unit
    assert (error[inside] <= unit / 2).all()
    assert torch.equal(error[~inside], x.double().abs()[~inside] - limit * unit)


@given(finite, mantissas)
def test_the_chosen_unit_is_relative_to_the_largest(x: Tensor, mantissa: int) -> None:
    found, statistics = flex.flex_quantise(x, exponent(UNKNOWN), mantissa)
    amax, limit = x.double().abs().max().item(), largest_mantissa(mantissa)
    if amax == 0:
        assert int(statistics[3]) == UNKNOWN
        return
    e = int(statistics[3])
    assert int(statistics[1]) == 0
    assert e == -126 or amax / 2.0 ** (e - 1) >= limit + 0.5  # so the unit is below 2 amax / M
    error = (found.double() * 2.0**e - x.double()).abs().max().item()
    assert error <= max(amax / limit, 2.0**-127)


@given(anything, exponents, mantissas)
def test_rounding_is_idempotent_monotone_and_odd(x: Tensor, e: int, mantissa: int) -> None:
    once, _ = flex.flex_round(x, exponent(e), mantissa)
    if once.isfinite().all():  # from 2^128 on it is not
        assert torch.equal(flex.flex_round(once, exponent(e), mantissa)[0], once)
    numbers = x[~x.isnan()].sort().values
    in_order, statistics = flex.flex_quantise(numbers, exponent(e), mantissa)
    assert (in_order.int().diff() >= 0).all()
    negative, same = flex.flex_quantise(-numbers, exponent(e), mantissa)
    assert torch.equal(negative, -in_order)
    assert torch.equal(same, statistics)
    assert not once[once == 0].signbit().any()


@given(finite, exponents, mantissas, st.integers(-60, 60))
def test_scaling_by_a_power_of_two_scales_the_unit(
    x: Tensor, e: int, mantissa: int, shift: int
) -> None:
    scaled = x * 2.0**shift
    is_exact = torch.equal(scaled.double(), x.double() * 2.0**shift)
    if not (is_exact and -126 <= e + shift <= 126):
        return
    found, statistics = flex.flex_quantise(x, exponent(e), mantissa)
    same, others = flex.flex_quantise(scaled, exponent(e + shift), mantissa)
    assert torch.equal(found, same)
    assert torch.equal(statistics[1:3], others[1:3])


@given(anything, exponents, mantissas)
def test_nothing_is_lost_silently(x: Tensor, e: int, mantissa: int) -> None:
    found, statistics = flex.flex_quantise(x, exponent(e), mantissa)
    limit = largest_mantissa(mantissa)
    amax = statistics[:1].view(torch.float32)
    numbers = x[x.isfinite()]
    assert amax.item() == (numbers.abs().max().item() if numbers.numel() else 0.0)
    exact = (x.double() / 2.0**e).round().abs()
    assert statistics.tolist()[1:] == [int((exact > limit).sum()), int(x.isnan().sum()), e]
    assert (found[exact > limit].abs() == limit).all()
    assert (found[x.isnan()] == 0).all()
    assert (found[x.isinf()] == x[x.isinf()].sign() * limit).all()


@given(anything, mantissas, exponents, st.integers(0, 2**31 - 1), st.integers(-(2**63), 2**63 - 1))
def test_stochastic_rounding_picks_a_neighbour(
    x: Tensor, mantissa: int, e: int, use: int, seed: int
) -> None:
    found, statistics = flex.flex_quantise(x, exponent(e), mantissa, use, torch.tensor([seed, 1]))
    limit = largest_mantissa(mantissa)
    exact = (x.double() / 2.0**e).nan_to_num(nan=0.0, posinf=math.inf, neginf=-math.inf)
    assert (found.double() >= exact.floor().clamp(-limit, limit)).all()
    assert (found.double() <= exact.ceil().clamp(-limit, limit)).all()
    certain = (exact.floor().abs() > limit) & (exact.ceil().abs() > limit)
    possible = (exact.floor().abs() > limit) | (exact.ceil().abs() > limit)
    assert int(certain.sum()) <= int(statistics[1]) <= int(possible.sum())
