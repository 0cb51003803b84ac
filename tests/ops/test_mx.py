"""MXFP8 against its definition in integers, and what the specification leaves open."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise

import ml_dtypes
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import graphopt.ops  # noqa: F401  (registers the operators)
from graphopt.errors import ArgumentError
from tests.support.float8_table import magnitudes, nearest_bytes, rows_at_every_exponent

mx = torch.ops.graphopt
E4M3 = torch.float8_e4m3fn
RULES = ["floor", "rceil"]
QUICK = settings(max_examples=80, deadline=None)


def as_bytes(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8)


def round_trip(x: Tensor, axis: int = -1, scaling: str = "floor") -> Tensor:
    values, scales = mx.mx_quantise(x, axis, scaling)
    result: Tensor = mx.mx_dequantise(values, scales, axis)
    return result


def exponent(amax: float, scaling: str) -> int:
    """Of a block's scale, by the rule in exact arithmetic."""
    if amax == 0:
        return -127
    if scaling == "floor":
        return max(math.frexp(amax)[1] - 1 - 8, -127)
    found = -127
    while Fraction(amax) > 448 * Fraction(2) ** found:
        found += 1
    return found


@pytest.mark.parametrize("scaling", RULES)
@pytest.mark.parametrize("axis", [0, 1])
def test_no_element_and_no_scale_is_wrong_at_any_exponent(scaling: str, axis: int) -> None:
    rows = rows_at_every_exponent(64)
    x = rows if axis == 1 else rows.t()
    values, scales = mx.mx_quantise(x, axis, scaling)
    found = as_bytes(scales if axis == 1 else scales.t().contiguous()).long()
    blocks = rows.view(len(rows), 2, 32)
    amax = blocks.abs().amax(-1)
    wanted = torch.tensor([[exponent(a, scaling) + 127 for a in row] for row in amax.tolist()])
    assert torch.equal(found, wanted)
    units = torch.pow(2.0, (wanted - 127).double()).unsqueeze(-1)
    elements = nearest_bytes(blocks.double() / units, E4M3).view(rows.shape)
    assert torch.equal(as_bytes(values if axis == 1 else values.t().contiguous()), elements)


def test_all_ties_at_all_scales() -> None:
    """Every half between neighbouring elements, under every scale that a normal block has."""
    grid = magnitudes(E4M3)
    halves = [float((a + b) / 2) for a, b in pairwise(grid)]
    missing = -len(halves) % 31
    ties = torch.tensor(halves + [0.0] * missing, dtype=torch.float64).view(-1, 31)
    ties = torch.cat([torch.full((len(ties), 1), 256.0), ties], 1)
    for power in range(-127, 119):
        x = (ties * 2.0**power).float()
        if not torch.equal(x.double(), ties * 2.0**power):
            continue  # below the subnormal numbers of float32
        values, scales = mx.mx_quantise(x, 1, "floor")
        assert as_bytes(scales).unique().tolist() == [power + 127]
        assert torch.equal(as_bytes(values), nearest_bytes(ties, E4M3))


def test_reading_back_is_exact() -> None:
    """All 256 elements times all 256 scales."""
    elements = torch.arange(256, dtype=torch.uint8).view(E4M3)
    scales = torch.arange(256, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    found = mx.mx_dequantise(elements.repeat(256, 1), scales.view(256, 1).repeat(1, 8), 1)
    sizes = torch.tensor([float(m) for m in magnitudes(E4M3)] + [math.nan], dtype=torch.float64)
    units = torch.pow(2.0, torch.arange(256, dtype=torch.float64) - 127)
    units[255] = math.nan
    wanted = (units.view(-1, 1) * torch.cat([sizes, -sizes])).float()
    assert torch.equal(found.isnan(), wanted.isnan())
    assert torch.equal(found.nan_to_num(1.0), wanted.nan_to_num(1.0))


def test_elements_are_those_of_ml_dtypes() -> None:
    x = rows_at_every_exponent(32, seed=1)
    x = x[x.abs().amax(1) > 0]
    values, scales = mx.mx_quantise(x, 1, "rceil")
    scaled = (x.double() / scales.float().double()).numpy()
    theirs = torch.from_numpy(scaled.astype(ml_dtypes.float8_e4m3fn).view("uint8").copy())
    assert torch.equal(as_bytes(values), theirs)


# -- what is not finite, not there, or not in order ------------------------------------------------


def test_a_nan_takes_its_block_and_no_other() -> None:
    x = torch.ones(2, 64)
    x[0, 5] = math.nan
    values, scales = mx.mx_quantise(x, 1, "floor")
    assert as_bytes(scales).tolist() == [[255, 119], [119, 119]]
    back = mx.mx_dequantise(values, scales, 1)
    assert back[0, :32].isnan().all()
    assert torch.equal(back[0, 32:], x[0, 32:])
    assert torch.equal(back[1], x[1])
    assert values[0, 5].float().isnan()


@pytest.mark.parametrize("scaling", RULES)
def test_infinity_stays_infinite(scaling: str) -> None:
    x = torch.ones(64)
    x[3], x[40] = math.inf, -math.inf
    back = round_trip(x, 0, scaling)
    assert back[3] == math.inf
    assert back[40] == -math.inf
    assert back[4] == 0  # no bits are left for the others
    # Rounded to four bits this is 2^128, or saturates below.
    largest = torch.full((32,), torch.finfo(torch.float32).max)
    wanted = 448 * 2.0**119 if scaling == "floor" else math.inf
    assert torch.equal(round_trip(largest, 0, scaling), torch.full((32,), wanted))


@pytest.mark.parametrize("scaling", RULES)
def test_zeros_outliers_and_the_smallest_numbers(scaling: str) -> None:
    zeros = torch.zeros(40)
    zeros[1] = -0.0
    values, scales = mx.mx_quantise(zeros, 0, scaling)
    assert as_bytes(scales).tolist() == [0, 0]
    back = mx.mx_dequantise(values, scales, 0)
    assert torch.equal(back, zeros)
    assert torch.equal(back.signbit(), zeros.signbit())
    outlier = torch.ones(64)
    outlier[7] = 2.0**100
    back = round_trip(outlier, 0, scaling)
    assert back[7] == 2.0**100
    assert back[:32].count_nonzero() == 1
    assert torch.equal(back[32:], outlier[32:])
    assert float(round_trip(torch.full((32,), 2.0**-136), 0, scaling)[0]) == 2.0**-136
    assert float(round_trip(torch.full((32,), 2.0**-149), 0, scaling)[0]) == 0.0


@pytest.mark.parametrize("size", [1, 31, 33, 70])
def test_a_last_block_that_is_short(size: int) -> None:
    x = torch.randn(3, size, generator=torch.Generator().manual_seed(size))
    values, scales = mx.mx_quantise(x, 1, "floor")
    assert scales.shape == (3, -(-size // 32))
    padded = torch.zeros(3, 96)
    padded[:, :size] = x
    wide, wide_scales = mx.mx_quantise(padded, 1, "floor")
    assert torch.equal(as_bytes(values), as_bytes(wide)[:, :size])
    assert torch.equal(as_bytes(scales), as_bytes(wide_scales)[:, : scales.shape[1]])


@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0), (2, 0, 3)])
def test_empty_tensors(shape: tuple[int, ...]) -> None:
    for axis in range(len(shape)):
        back = round_trip(torch.empty(shape), axis)
        assert (back.shape, back.dtype) == (torch.Size(shape), torch.float32)


def test_layouts_do_not_matter_and_are_kept() -> None:
    base = torch.randn(40, 6, 35, generator=torch.Generator().manual_seed(0))
    for x in (base, base.permute(2, 0, 1), base[::3, :, 1:], base[:, :1].expand(40, 6, 35)):
        for axis in range(3):
            values, scales = mx.mx_quantise(x, axis, "floor")
            assert values.stride() == torch.empty_like(x).stride()
            plain, plain_scales = mx.mx_quantise(x.contiguous(), axis, "floor")
            assert torch.equal(as_bytes(values.contiguous()), as_bytes(plain))
            assert torch.equal(as_bytes(scales), as_bytes(plain_scales))


def test_tracing() -> None:
    x = torch.randn(5, 40).t()
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(mx.mx_quantise.default, (x, 0, "floor"), test_utils=tests)
    values, scales = mx.mx_quantise(x, 0, "floor")
    torch.library.opcheck(mx.mx_dequantise.default, (values, scales, 0), test_utils=tests[1:])


def test_bad_input() -> None:
    with pytest.raises(ArgumentError, match=r"takes float32, not torch\.float64"):
        mx.mx_quantise(torch.ones(4).double(), 0, "floor")
    with pytest.raises(ArgumentError, match="axis=2 is not one of the 2 axes"):
        mx.mx_quantise(torch.ones(4, 4), 2, "floor")
    with pytest.raises(ArgumentError, match="scaling='ceil' is no rule"):
        mx.mx_quantise(torch.ones(4), 0, "ceil")


# -- bounds ----------------------------------------------------------------------------------------

# Of 32-bit numbers the largest three percent may round to 2^128, which is infinite in float32.
ELEMENTS = st.floats(-(2.0**127), 2.0**127, width=32)
BLOCKS = st.lists(st.one_of(ELEMENTS, st.floats(-4, 4, width=32)), min_size=1, max_size=40).map(
    torch.tensor
)
NORMAL = 2.0**-110  # below, an element may be a subnormal number at the least scale


@QUICK
@given(x=BLOCKS, scaling=st.sampled_from(RULES))
def test_errors_are_a_share_of_the_blocks_magnitude(x: Tensor, scaling: str) -> None:
    back = round_trip(x, 0, scaling)
    for block, found in zip(x.split(32), back.split(32), strict=True):
        amax = block.abs().max().double()
        error = (found.double() - block.double()).abs()
        # By the rule of the specification 512 units may come out as 448.
        assert bool((error <= amax / (8 if scaling == "floor" else 16) + 2.0**-137).all())
        unit = 2.0 ** exponent(float(amax), scaling)
        inside = block.double().abs() <= 448 * unit
        size = block.double().abs().clamp(min=2.0**-6 * unit)
        assert bool((error <= size / 16)[inside].all())


@QUICK
@given(x=BLOCKS, scaling=st.sampled_from(RULES))
def test_rounding_again_changes_nothing(x: Tensor, scaling: str) -> None:
    once = round_trip(x, 0, scaling)
    assert torch.equal(round_trip(once, 0, scaling), once)


@QUICK
@given(x=BLOCKS, scaling=st.sampled_from(RULES))
def test_signs_and_order(x: Tensor, scaling: str) -> None:
    back = round_trip(x, 0, scaling)
    negated = round_trip(-x, 0, scaling)
    assert torch.equal(negated, -back)
    assert torch.equal(negated.signbit(), ~back.signbit())
    for block, found in zip(x.split(32), back.split(32), strict=True):
        order = block.argsort()
        assert bool((found[order].diff() >= 0).all())


@QUICK
@given(x=BLOCKS, scaling=st.sampled_from(RULES), power=st.integers(-20, 20))
def test_powers_of_two_go_through(x: Tensor, scaling: str, power: int) -> None:
    x = torch.where(x.abs() < NORMAL * 2.0**20, 0.0, x).clamp(-(2.0**90), 2.0**90)
    factor = 2.0**power
    there = round_trip(x * factor, 0, scaling)
    assert torch.equal(there, round_trip(x, 0, scaling) * factor)
