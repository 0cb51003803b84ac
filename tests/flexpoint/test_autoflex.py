"""The rules by which exponents follow: against scalar oracles, and the properties they have."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from graphopt.ops.flex import UNKNOWN, chosen_exponent, largest_mantissa
from graphopt.passes.flexpoint import window
from graphopt.runtime.flexpoint.autoflex import (
    RULES,
    Limits,
    Memory,
    bits_of,
    mantissas,
    renew,
)
from tests.flexpoint.oracle import Scalar, algorithm_1, gamma_of

WIDE = Limits(16, -126, 126)
PREDICTING = ["paper", "code2016", "delayed"]
# Largest magnitudes whose units are far from the limits.
SIZES = st.floats(-30, 30).map(lambda e: float(torch.tensor(2.0**e)))


def fresh(count: int, rule: str) -> Memory:
    return Memory(
        torch.full((count,), UNKNOWN, dtype=torch.int32),
        torch.zeros(count, RULES[rule].length),
        torch.zeros(count, dtype=torch.int64),
        torch.zeros(count, dtype=torch.int64),
        torch.zeros((), dtype=torch.int64),
    )


def follow(rule: str, series: Tensor, limits: Limits = WIDE) -> tuple[Memory, list[list[int]]]:
    """Exponents after each row of largest magnitudes [steps, n]."""
    memory, found = fresh(series.shape[1], rule), []
    for row in series:
        renew(RULES[rule], memory, bits_of(row), limits)
        found.append(memory.exponents.tolist())
    return memory, found


@pytest.mark.parametrize("rule", PREDICTING)
@pytest.mark.parametrize("spread", [0.1, 0.7, 3.0])
@pytest.mark.parametrize(("bits", "least", "most"), [(16, -126, 126), (16, -31, 0), (10, -31, 0)])
def test_all_tensors_follow_their_scalar_oracle(
    rule: str, spread: float, bits: int, least: int, most: int
) -> None:
    generator = torch.Generator().manual_seed(1)
    scale = torch.randn(12, generator=generator) * 6
    series = (scale + spread * torch.randn(60, 12, generator=generator)).exp()
    series[torch.rand(60, 12, generator=generator) < 0.1] = 0.0
    series[:, 1] = 0.0
    series[:, 2] *= (torch.arange(60) % 20 == 0).float()  # stale
    series[30, 3:6] *= 1000
    _, found = follow(rule, series, Limits(bits, least, most))
    oracles = [Scalar(rule, bits, least, most) for _ in range(12)]
    for row, exponents in zip(series.tolist(), found, strict=True):
        wanted = [oracle.renew(amax) for oracle, amax in zip(oracles, row, strict=True)]
        assert exponents == [UNKNOWN if w is None else w for w in wanted]


def test_the_queue_forgets_after_its_length() -> None:
    series = torch.ones(40, 1)
    series[0] = 100.0
    _, found = follow("paper", series)
    before, after = found[15][0], found[16][0]
    assert after < before
    assert len({e for (e,) in found[20:]}) == 1
    long = torch.ones(1030, 1)
    long[0] = 100.0
    _, found = follow("delayed", long)
    assert found[1022] == found[1]
    assert found[1024][0] == found[1][0] - 6


def test_current_scaling_stays_unknown() -> None:
    memory, found = follow("current", torch.rand(5, 3) + 0.1)
    assert found == [[UNKNOWN] * 3] * 5
    assert memory.renewals == 5


# -- Algorithm 1 -----------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(amax=st.floats(2.0**-100, 2.0**100, width=32), bits=st.integers(9, 16))
def test_the_operators_own_choice_is_where_trial_and_error_ends(amax: float, bits: int) -> None:
    chosen = int(chosen_exponent(bits_of(torch.tensor(amax)), bits))
    end = algorithm_1(amax, bits)
    # It leaves the top bit free where it jumped last, and saturates at M where it did not need to.
    assert chosen - end in (-1, 0)
    gamma = gamma_of(amax, chosen, bits)
    if gamma < largest_mantissa(bits):
        assert algorithm_1(amax, bits, start=chosen) == chosen


def test_trial_and_error_does_not_end_for_zeros() -> None:
    with pytest.raises(AssertionError, match="not finished"):
        algorithm_1(0.0, 16)
    memory, _ = follow("paper", torch.zeros(3, 1))
    assert memory.exponents.tolist() == [UNKNOWN]


# -- properties ------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(series=st.lists(SIZES, min_size=1, max_size=24))
def test_what_is_predicted_fits(series: list[float]) -> None:
    """χ <= 2^(N-1) κ', and the next magnitude up to χ (1 - 2^-15) does not saturate."""
    memory = fresh(1, "paper")
    oracle = Scalar("paper", 16, -126, 126)
    for amax in series:
        before = oracle.exponent
        renew(RULES["paper"], memory, bits_of(torch.tensor([amax])), WIDE)
        oracle.renew(amax)
        used = before if before is not None else oracle._fits(amax)
        mean = sum(oracle.queue) / len(oracle.queue)
        deviation = math.sqrt(sum((q - mean) ** 2 for q in oracle.queue) / len(oracle.queue))
        chi = 2 * (max(oracle.queue) + 3 * deviation + 100 * 2.0**used)
        unit = 2.0 ** int(memory.exponents)
        assert chi <= 2**15 * unit * (1 + 1e-12)
        following = float(torch.tensor(chi * (1 - 2**-15)))
        assert round(following / unit) <= 32767


@pytest.mark.parametrize(("rule", "factor"), [("paper", 3), ("code2016", 2)])
@settings(max_examples=40, deadline=None)
@given(history=st.lists(SIZES, min_size=1, max_size=20), times=st.floats(1.01, 2.0**20))
def test_after_an_overflow_the_unit_grows_by_one_factor(
    rule: str, factor: int, history: list[float], times: float
) -> None:
    memory, _ = follow(rule, torch.tensor(history)[:, None])
    before = int(memory.exponents)
    amax = torch.tensor([32767.5 * 2.0**before * times])
    renew(RULES[rule], memory, bits_of(amax), WIDE)
    assert int(memory.exponents) == before + factor


@settings(max_examples=25, deadline=None)
@given(jump=st.floats(1.0, 2.0**40))
def test_consecutive_overflows_are_few(jump: float) -> None:
    """At most as many as powers of 8 in the jump."""
    memory, _ = follow("paper", torch.ones(20, 1))
    amax, count = torch.tensor([jump]), 0
    most = math.ceil(math.log(max(1.0, jump / (32767 * 2.0 ** int(memory.exponents))), 8))
    for _ in range(40):
        _gamma, unit = mantissas(bits_of(amax), memory.exponents, WIDE)
        count += bool((amax.double() / unit).round() > 32767)
        renew(RULES["paper"], memory, bits_of(amax), WIDE)
    assert count <= most


@pytest.mark.parametrize("rule", PREDICTING)
@settings(max_examples=40, deadline=None)
@given(amax=SIZES)
def test_a_constant_input_keeps_its_exponent(rule: str, amax: float) -> None:
    _, found = follow(rule, torch.full((40, 1), amax))
    assert len({e for (e,) in found[20:]}) == 1
    gamma = gamma_of(amax, found[-1][0], 16)
    low, high = {"paper": (8092, 16284), "code2016": (16184, 32668), "delayed": (16383, 32767)}[
        rule
    ]
    assert low <= gamma <= high


@pytest.mark.parametrize("rule", PREDICTING)
@settings(max_examples=25, deadline=None)
@given(series=st.lists(SIZES, min_size=1, max_size=20), zeros=st.integers(1, 40))
def test_zeros_change_nothing(rule: str, series: list[float], zeros: int) -> None:
    memory, _ = follow(rule, torch.tensor(series)[:, None])
    before = memory.exponents.clone(), memory.queue.clone(), memory.lengths.clone()
    for _ in range(zeros):
        renew(RULES[rule], memory, torch.zeros(1, dtype=torch.int32), WIDE)
    for old, new in zip(before, (memory.exponents, memory.queue, memory.lengths), strict=True):
        assert torch.equal(old, new)


@pytest.mark.parametrize("rule", PREDICTING)
@settings(max_examples=40, deadline=None)
@given(series=st.lists(SIZES, min_size=1, max_size=30), power=st.integers(-40, 40))
def test_scaling_all_magnitudes_scales_all_units(
    rule: str, series: list[float], power: int
) -> None:
    base = torch.tensor(series)[:, None]
    scaled = base * 2.0**power
    assume(bool(torch.isfinite(scaled).all()) and bool((scaled > 2.0**-100).all()))
    _, one = follow(rule, base)
    _, other = follow(rule, scaled)
    assert [e + power for (e,) in one] == [e for (e,) in other]


def test_exponents_stay_within_the_window() -> None:
    assert window(5) == (-31, 0)
    assert window(4) == (-15, 0)
    assert window(7) == (-126, 0)
    assert window(8) == (-126, 126)
    assert all(high - low + 1 == 2**bits for bits in range(1, 7) for low, high in [window(bits)])
    _, found = follow("paper", torch.tensor([[1e-20, 1e20]] * 3), Limits(16, *window(5)))
    assert found[-1] == [-31, 0]
