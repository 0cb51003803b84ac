"""Sixteen-bit integers that choose their exponent: bounds, and what is not finite."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import graphopt.ops  # noqa: F401  (registers the operators)

ops = torch.ops.graphopt
QUICK = settings(max_examples=80, deadline=None)
TENSORS = st.lists(
    st.one_of(st.floats(-(2.0**127), 2.0**127, width=32), st.floats(-4, 4, width=32)),
    min_size=1,
    max_size=20,
).map(torch.tensor)


def round_trip(x: Tensor) -> Tensor:
    result: Tensor = ops.flex16_dequantise(*ops.flex16_quantise(x))
    return result


@QUICK
@given(x=TENSORS)
def test_errors_are_a_share_of_the_largest_magnitude(x: Tensor) -> None:
    error = (round_trip(x).double() - x.double()).abs()
    amax = float(x.abs().max())
    assert float(error.max()) <= max(amax / 32767, 2.0**-127)  # the least unit is 2^-126


@QUICK
@given(x=TENSORS)
def test_rounding_again_signs_and_order(x: Tensor) -> None:
    once = round_trip(x)
    assert torch.equal(round_trip(once), once)
    assert torch.equal(round_trip(-x), -once)
    assert bool((once[x.argsort()].diff() >= 0).all())


@QUICK
@given(x=TENSORS)
def test_the_mantissas_are_those_of_flex_quantise(x: Tensor) -> None:
    mantissas, scale = ops.flex16_quantise(x)
    exponent = torch.tensor(-(2**31), dtype=torch.int32)
    wanted, statistics = ops.flex_quantise(x, exponent, 16)
    assert torch.equal(mantissas, wanted)
    if x.any():
        assert float(scale) == 2.0 ** int(statistics[3])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_takes_the_tensor(bad: float) -> None:
    assert round_trip(torch.tensor([1.0, bad, 0.0])).isnan().all()
    assert round_trip(torch.tensor([bad])).isnan().all()


def test_zeros_outliers_and_nothing() -> None:
    assert torch.equal(round_trip(torch.zeros(3)), torch.zeros(3))
    back = round_trip(torch.tensor([1.0, 2.0**20]))
    assert back.tolist() == [0.0, 2.0**20]
    assert round_trip(torch.empty(0, 3)).shape == (0, 3)


def test_layouts_are_kept_and_tracing() -> None:
    base = torch.randn(4, 6, 5, 7).to(memory_format=torch.channels_last)
    for x in (base, base.permute(3, 0, 1, 2), base[:, ::2]):
        mantissas, scale = ops.flex16_quantise(x)
        assert mantissas.stride() == torch.empty_like(x).stride()
        assert torch.equal(round_trip(x), round_trip(x.contiguous()))
        torch.library.opcheck(ops.flex16_dequantise.default, (mantissas, scale))
    torch.library.opcheck(ops.flex16_quantise.default, (base,))
