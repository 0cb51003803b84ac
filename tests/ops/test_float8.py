"""Float8 with one scale per tensor or row: bits, bounds, corner cases and bad input."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import graphopt.ops  # noqa: F401  (registers the operators)
from graphopt.errors import ArgumentError
from tests.support.float8_table import nearest_bytes, rows_at_every_exponent

ops = torch.ops.graphopt
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
LARGEST = {E4M3: 448.0, E5M2: 57344.0}
QUICK = settings(max_examples=80, deadline=None)


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8)


def wanted_scale(amax: float, dtype: torch.dtype, power_of_two: bool) -> float:
    """By numpy's arithmetic and, for powers of two, by Python's exact exponent."""
    scale = float(np.float32(np.float64(LARGEST[dtype]) / max(np.float64(amax), 1e-12)))
    return math.ldexp(1.0, math.frexp(scale)[1] - 1) if power_of_two else scale


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_no_element_and_no_scale_is_wrong_at_any_exponent(
    dtype: torch.dtype, power_of_two: bool, axis: int | None
) -> None:
    rows = rows_at_every_exponent(32)
    if axis is None:
        cases = [(row, *ops.float8_quantise(row, dtype, None, power_of_two)) for row in rows[::5]]
    else:
        x = rows if axis == 1 else rows.t()
        values, scales = ops.float8_quantise(x, dtype, axis, power_of_two)
        values, scales = (values, scales) if axis == 1 else (values.t(), scales.t())
        cases = list(zip(rows, values, scales, strict=True))
    for row, values, scale in cases:
        wanted = wanted_scale(float(row.abs().max()), dtype, power_of_two)
        assert float(scale) == wanted
        scaled = torch.from_numpy(row.numpy() * np.float32(wanted)).double()
        assert torch.equal(as_bytes(values.contiguous()), nearest_bytes(scaled, dtype))


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_torchs_casts_are_right(dtype: torch.dtype) -> None:
    """The cast itself, over all exponents and halves between neighbours, vectorised or not."""
    x = torch.cat([rows_at_every_exponent(33, seed=2).flatten(), torch.linspace(-2, 2, 4001)])
    x = x[x.abs() <= LARGEST[dtype]]
    for view in (x, x[1:], x[:7], x[::2]):
        assert torch.equal(as_bytes(view.to(dtype)), nearest_bytes(view.double(), dtype))


def test_casts_are_those_of_ml_dtypes() -> None:
    x = rows_at_every_exponent(32, seed=3)
    for dtype, name in ((E4M3, "float8_e4m3fn"), (E5M2, "float8_e5m2")):
        values, scale = ops.float8_quantise(x, dtype, 1, True)
        theirs = (x * scale).clamp(-LARGEST[dtype], LARGEST[dtype]).numpy()
        theirs = theirs.astype(getattr(ml_dtypes, name)).view("uint8")
        assert torch.equal(as_bytes(values), torch.from_numpy(theirs.copy()))


# -- what is not finite, not there, or not in order ------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("power_of_two", [False, True])
def test_what_is_not_finite_takes_all_that_shares_its_scale(bad: float, power_of_two: bool) -> None:
    x = torch.ones(2, 5)
    x[0, 3] = bad
    for dtype in (E4M3, E5M2):
        assert (
            ops.float8_dequantise(*ops.float8_quantise(x, dtype, None, power_of_two)).isnan().all()
        )
        back = ops.float8_dequantise(*ops.float8_quantise(x, dtype, 1, power_of_two))
        assert back[0].isnan().all()
        assert torch.equal(back[1], x[1])


def test_zeros_outliers_and_tiny_numbers() -> None:
    zeros = torch.tensor([0.0, -0.0])
    values, scale = ops.float8_quantise(zeros, E4M3, None, False)
    assert float(scale) == float(np.float32(448 / 1e-12))
    assert ops.float8_dequantise(values, scale).signbit().tolist() == [False, True]
    outlier = torch.tensor([1e-3, 1.0, 1e6])
    back = ops.float8_dequantise(*ops.float8_quantise(outlier, E4M3, None, True))
    assert back[:2].tolist() == [0.0, 0.0]
    assert abs(float(back[2]) - 1e6) <= 1e6 / 28
    tiny = ops.float8_dequantise(*ops.float8_quantise(torch.tensor([1e-30]), E4M3, None, False))
    assert float(tiny) == 0.0  # magnitudes below 1e-12 get no larger scale


@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0)])
@pytest.mark.parametrize("axis", [None, 0, -1])
def test_empty_tensors(shape: tuple[int, ...], axis: int | None) -> None:
    values, scale = ops.float8_quantise(torch.empty(shape), E4M3, axis, True)
    assert ops.float8_dequantise(values, scale).shape == torch.Size(shape)
    assert scale.isfinite().all()


def test_layouts_are_kept_and_tracing() -> None:
    base = torch.randn(4, 6, 5, 7).to(memory_format=torch.channels_last)
    for x in (base, base.permute(3, 0, 1, 2), base[:, ::2]):
        values, scale = ops.float8_quantise(x, E5M2, 1, True)
        assert values.stride() == torch.empty_like(x).stride()
        assert ops.float8_dequantise(values, scale).stride() == values.stride()
    tests = ("test_schema", "test_faketensor")
    for axis in (None, 2):
        call = (base, E4M3, axis, False)
        torch.library.opcheck(ops.float8_quantise.default, call, test_utils=tests)
        parts = ops.float8_quantise(*call)
        torch.library.opcheck(ops.float8_dequantise.default, parts, test_utils=tests[1:])


def test_bad_input() -> None:
    with pytest.raises(ArgumentError, match=r"made of float32, not torch\.int64"):
        ops.float8_quantise(torch.ones(3, dtype=torch.int64), E4M3, None, False)
    with pytest.raises(ArgumentError, match=r"torch\.float16 is no float8 format"):
        ops.float8_quantise(torch.ones(3), torch.float16, None, False)
    with pytest.raises(ArgumentError, match="axis=1 is not one of the 1 axes"):
        ops.float8_quantise(torch.ones(3), E4M3, 1, False)


# -- bounds ----------------------------------------------------------------------------------------

ELEMENTS = st.floats(-(2.0**100), 2.0**100, width=32)
TENSORS = st.lists(st.one_of(ELEMENTS, st.floats(-4, 4, width=32)), min_size=1, max_size=20).map(
    torch.tensor
)
DTYPES = st.sampled_from([E4M3, E5M2])


@QUICK
@given(x=TENSORS, dtype=DTYPES, power_of_two=st.booleans())
def test_errors_are_a_share_of_the_tensors_magnitude(
    x: Tensor, dtype: torch.dtype, power_of_two: bool
) -> None:
    back = ops.float8_dequantise(*ops.float8_quantise(x, dtype, None, power_of_two))
    amax = max(float(x.abs().max()), 1e-12)
    share = {E4M3: 1 / 28, E5M2: 1 / 14}[dtype]  # half a step of the last binade, 16 of 448
    if power_of_two:
        share = {E4M3: 1 / 16, E5M2: 1 / 8}[dtype]  # its largest element may begin a binade
    assert float((back.double() - x.double()).abs().max()) <= share * amax * (1 + 1e-6)


@QUICK
@given(x=TENSORS, dtype=DTYPES, power_of_two=st.booleans())
def test_rounding_again_signs_and_order(x: Tensor, dtype: torch.dtype, power_of_two: bool) -> None:
    values, scale = ops.float8_quantise(x, dtype, None, power_of_two)
    once = ops.float8_dequantise(values, scale)
    again, new_scale = ops.float8_quantise(once, dtype, None, power_of_two)
    if power_of_two:  # any other scale may change by its last digit
        assert torch.equal(ops.float8_dequantise(again, new_scale), once)
    elif float(x.abs().max()) > 1e-12:
        assert torch.equal(as_bytes(again), as_bytes(values))
    negated = ops.float8_dequantise(*ops.float8_quantise(-x, dtype, None, power_of_two))
    assert torch.equal(negated, -once)
    assert bool((once[x.argsort()].diff() >= 0).all())
