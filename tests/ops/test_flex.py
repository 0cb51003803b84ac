"""The operators of flex tensors: against integers, on corner cases, layouts and bad input."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from graphopt.errors import ArgumentError
from graphopt.ops.flex import UNKNOWN
from graphopt.ops.philox import words
from tests.support.flex import exact_exponent, exact_mantissas, exact_philox, exponent, hard_bits

flex = torch.ops.graphopt
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def value_of(bits: int) -> float:
    return float(np.array(bits, dtype=np.uint32).view(np.float32))


def bits_of(value: float) -> int:
    return int(np.array(value, dtype=np.float32).view(np.uint32))


@pytest.mark.parametrize("mantissa", [8, 11, 16])
@pytest.mark.parametrize("device", DEVICES)
def test_nothing_is_rounded_wrongly_at_any_exponent(mantissa: int, device: str) -> None:
    for e in range(-126, 127):
        bits = hard_bits(e, mantissa, count=200)
        x = torch.from_numpy(bits.view(np.float32)).to(device)
        found, statistics = flex.flex_quantise(x, exponent(e, device), mantissa)
        wanted, saturated = exact_mantissas(bits, e, mantissa)
        assert np.array_equal(found.cpu().numpy(), wanted), e
        assert statistics.tolist()[1:] == [saturated, 0, e]
        rounded, same = flex.flex_round(x, exponent(e, device), mantissa)
        assert torch.equal(same, statistics)
        assert torch.equal(rounded, flex.flex_dequantise(found, exponent(e, device)))
        exact = torch.from_numpy(wanted).double() * 2.0**e
        assert torch.equal(rounded.cpu(), exact.float())  # infinite only from 2^128 on


@pytest.mark.parametrize("mantissa", [8, 9, 16])
def test_an_unknown_exponent_is_the_least_that_fits(mantissa: int) -> None:
    limit = 2 ** (mantissa - 1) - 1
    edge = np.float32(limit + 0.5)  # a tie, which goes to the even M + 1
    near = [np.nextafter(edge, np.float32(0)), edge, np.nextafter(edge, np.float32(math.inf))]
    for shift in range(-149, 120):
        for significand in (*near, 1.0, 1.5, limit, limit - 0.5):
            value = float(torch.tensor(math.ldexp(float(significand), shift)))
            if not 0 < value < math.inf:
                continue
            x = torch.tensor([0.0, -value, math.inf, math.nan])
            mantissas, statistics = flex.flex_quantise(x, exponent(UNKNOWN), mantissa)
            wanted = exact_exponent(Fraction(value), mantissa)
            assert statistics.tolist() == [bits_of(value), 1, 1, wanted]
            assert abs(int(mantissas[1])) <= limit


@pytest.mark.parametrize("shape", [(0,), (3, 0), (5,), ()])
@pytest.mark.parametrize("operator", [flex.flex_quantise, flex.flex_round])
def test_zeros_leave_the_exponent_unknown(operator: Any, shape: tuple[int, ...]) -> None:
    x = -torch.zeros(shape)
    result, statistics = operator(x, exponent(UNKNOWN), 16)
    assert result.shape == x.shape
    assert statistics.tolist() == [0, 0, 0, UNKNOWN]
    assert not result.signbit().any()
    assert operator(x, exponent(-7), 16)[1].tolist() == [0, 0, 0, -7]
    # What callers pass on decodes to zeros.
    mantissas, statistics = flex.flex_quantise(x, exponent(UNKNOWN), 16)
    assert torch.equal(flex.flex_dequantise(mantissas, statistics.select(0, 3)), torch.zeros(shape))


def test_infinities_saturate_and_nan_is_counted() -> None:
    x = torch.tensor([math.inf, -math.inf, math.nan, -math.nan, 1.0, -3e38, 32767.5, 32767.0])
    mantissas, statistics = flex.flex_quantise(x, exponent(0), 16)
    assert mantissas.tolist() == [32767, -32767, 0, 0, 1, -32767, 32767, 32767]
    assert statistics.tolist() == [bits_of(3e38), 4, 2, 0]
    rounded, same = flex.flex_round(x, exponent(0), 16)
    assert rounded.tolist() == [32767, -32767, 0, 0, 1, -32767, 32767, 32767]
    assert torch.equal(same, statistics)
    lost = torch.tensor([math.nan, math.inf])
    assert flex.flex_quantise(lost, exponent(UNKNOWN), 16)[1].tolist() == [0, 1, 1, UNKNOWN]
    mask = torch.tensor([0.0, -math.inf])
    mantissas, statistics = flex.flex_quantise(mask, exponent(UNKNOWN), 16)
    assert flex.flex_dequantise(mantissas, statistics[3]).tolist() == [0.0, -32767.0]
    assert flex.flex_round(mask, exponent(UNKNOWN), 16)[0].tolist() == [0.0, -32767.0]


def test_one_outlier_hides_the_rest() -> None:
    x = torch.full((1000,), 1e-3)
    x[500] = 1e30
    rounded, statistics = flex.flex_round(x, exponent(UNKNOWN), 16)
    assert rounded.count_nonzero() == 1
    assert abs(rounded[500] - 1e30) <= 1e30 / 32767
    assert statistics.tolist()[1:3] == [0, 0]


def test_subnormal_numbers() -> None:
    x = torch.tensor([1e-45, -1e-40, 2.0**-127, 1.5 * 2.0**-127, 2.0**-126, -(2.0**-126)])
    rounded, statistics = flex.flex_round(x, exponent(UNKNOWN), 16)
    assert statistics.tolist() == [bits_of(2.0**-126), 0, 0, -126]
    assert rounded.tolist() == [0, 0, 0, 2.0**-126, 2.0**-126, -(2.0**-126)]


def test_exponents_out_of_range_are_clamped() -> None:
    x = torch.tensor([1.0, -1.0])
    for given, used in ((-127, -126), (-(2**31) + 1, -126), (127, 126), (2**31 - 1, 126)):
        mantissas, statistics = flex.flex_quantise(x, exponent(given), 16)
        wanted, saturated = flex.flex_quantise(x, exponent(used), 16)
        assert torch.equal(mantissas, wanted)
        assert statistics.tolist() == saturated.tolist() == [bits_of(1), saturated[1], 0, used]


LAYOUTS = {
    "transposed": lambda: torch.randn(4, 6).t(),
    "channels last": lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "every other": lambda: torch.randn(6, 8)[::2, 1::3],
    "expanded": lambda: torch.randn(3, 1).expand(3, 4),
    "a number": lambda: torch.randn(()),
    "a parameter": lambda: torch.randn(4, requires_grad=True),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("stochastic", [False, True])
@torch.no_grad()
def test_layout_changes_no_bit(layout: str, stochastic: bool) -> None:
    x = LAYOUTS[layout]()
    random = (3, torch.tensor([5, 6])) if stochastic else ()
    for operator in (flex.flex_quantise, flex.flex_round):
        found, statistics = operator(x, exponent(UNKNOWN), 10, *random)
        wanted, same = operator(x.detach().clone().contiguous(), exponent(UNKNOWN), 10, *random)
        assert torch.equal(found, wanted)
        assert torch.equal(statistics, same)
        assert found.stride() == torch.empty_like(x).stride()
        assert not found.requires_grad
        with FakeTensorMode() as mode:
            fakes = operator(mode.from_tensor(x), exponent(0), 10)
        for real, fake in zip((found, statistics), fakes, strict=True):
            assert (fake.shape, fake.dtype, fake.stride()) == (
                real.shape,
                real.dtype,
                real.stride(),
            )
    mantissas, _ = flex.flex_quantise(x, exponent(-8), 10)
    values = flex.flex_dequantise(mantissas, exponent(-8))
    assert torch.equal(values, mantissas.float() / 256)
    assert values.stride() == mantissas.stride()


def test_operators_are_nodes_of_a_graph() -> None:
    def run(x: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
        mantissas, statistics = flex.flex_quantise(x, e, 16)
        return flex.flex_dequantise(mantissas, statistics.select(0, 3)), flex.flex_round(x, e, 8)[0]

    x, e = torch.randn(7), exponent(UNKNOWN)
    graph = make_fx(run, tracing_mode="fake")(x, e)
    targets = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert [name for name in targets if "flex" in name] == [
        f"graphopt.flex_{name}.default" for name in ("quantise", "dequantise", "round")
    ]
    for found, wanted in zip(graph(x, e), run(x, e), strict=True):
        assert torch.equal(found, wanted)
    torch.library.opcheck(flex.flex_quantise.default, (x, e, 16))
    torch.library.opcheck(flex.flex_round.default, (x, e, 16, 1, torch.tensor([0, 1])))
    mantissas = torch.tensor([1, 2], dtype=torch.int16)
    torch.library.opcheck(flex.flex_dequantise.default, (mantissas, e))


def test_philox_is_the_published_generator() -> None:
    # Known answers of the authors' library: counter and key of zeros, and of ones.
    assert exact_philox((0, 0, 0, 0), (0, 0)) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)
    ones = 2**32 - 1
    assert exact_philox((ones,) * 4, (ones,) * 2) == (
        *(0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    )
    for seed, step, use in ((0, 0, 0), (2**62 + 12345, 77, 3), (-5, 2**40 + 9, 2**31 - 1)):
        found = words(11, torch.tensor([seed, step]), use).tolist()
        key = seed & ones, seed >> 32 & ones
        blocks = [exact_philox((i, 0, step & ones, use), key) for i in range(3)]
        assert found == [word for block in blocks for word in block][:11]


@pytest.mark.parametrize("mantissa", [8, 16])
def test_stochastic_rounding_is_that_of_the_published_generator(mantissa: int) -> None:
    seed, step, use = 123, 45, 6
    for e in (-126, -20, 0, 100):
        bits = hard_bits(e, mantissa, count=200)
        x = torch.from_numpy(bits.view(np.float32))
        found, statistics = flex.flex_quantise(
            x, exponent(e), mantissa, use, torch.tensor([seed, step])
        )
        wanted, saturated = exact_mantissas(bits, e, mantissa, (seed, step, use))
        assert np.array_equal(found.numpy(), wanted)
        assert statistics.tolist()[1:] == [saturated, 0, e]
        rounded, same = flex.flex_round(x, exponent(e), mantissa, use, torch.tensor([seed, step]))
        assert torch.equal(rounded, flex.flex_dequantise(found, exponent(e)))
        assert torch.equal(same, statistics)


def test_stochastic_rounding_is_unbiased() -> None:
    count = 200_000
    for fraction in (0.0, 0.125, 0.5, 0.9, 1 - 2**-10):
        for whole in (-3.0, 0.0, 100.0):
            x = torch.full((count,), whole + fraction)
            found, _ = flex.flex_quantise(x, exponent(0), 16, 0, torch.tensor([7, 0]))
            ups = (found.double() - whole).sum().item()
            # Five standard deviations of a binomial distribution; the seed is fixed.
            room = 5 * math.sqrt(count * fraction * (1 - fraction))
            assert abs(ups - count * fraction) <= room
    uses = [flex.flex_quantise(x, exponent(0), 16, u, torch.tensor([7, 0]))[0] for u in (1, 2)]
    steps = [flex.flex_quantise(x, exponent(0), 16, 1, torch.tensor([7, s]))[0] for s in (1, 2)]
    assert not torch.equal(*uses)
    assert not torch.equal(*steps)


BAD: dict[str, tuple[Any, str]] = {
    "half": (lambda: flex.flex_quantise(torch.ones(2).half(), exponent(0), 16), "dense float32"),
    "bits": (lambda: flex.flex_round(torch.ones(2), exponent(0), 17), "mantissa=17"),
    "few bits": (lambda: flex.flex_quantise(torch.ones(2), exponent(0), 7), "mantissa=7"),
    "exponents": (
        lambda: flex.flex_quantise(torch.ones(2), torch.zeros(2).int(), 16),
        "not torch.int32 of shape (2,) on cpu",
    ),
    "exponent": (lambda: flex.flex_round(torch.ones(2), torch.tensor(0), 16), "torch.int64"),
    "mantissas": (lambda: flex.flex_dequantise(torch.ones(2), exponent(0)), "are int16"),
    "no seed": (lambda: flex.flex_round(torch.ones(2), exponent(0), 16, 1), "not one of both"),
    "no use": (
        lambda: flex.flex_round(torch.ones(2), exponent(0), 16, None, torch.tensor([1, 2])),
        "not one of both",
    ),
    "use": (
        lambda: flex.flex_round(torch.ones(2), exponent(0), 16, -1, torch.tensor([1, 2])),
        "use=-1 is out of range",
    ),
    "seed": (
        lambda: flex.flex_round(torch.ones(2), exponent(0), 16, 1, torch.tensor([1])),
        "not torch.int64 of shape (1,)",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    run, message = BAD[case]
    with pytest.raises(ArgumentError) as caught:
        run()
    assert message in str(caught.value)
    assert caught.value.hint
