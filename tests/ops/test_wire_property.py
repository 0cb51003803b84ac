"""The int32 wire on generated gradients, against exact rational arithmetic."""

from __future__ import annotations

import math
import random
from fractions import Fraction

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import graphopt.ops  # noqa: F401  (registers the operators)

wire = torch.ops.graphopt
QUICK = settings(max_examples=60, deadline=None)
LARGEST = float(np.finfo(np.float32).max)

ELEMENTS = st.one_of(
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.floats(-1, 1, width=32),
    st.sampled_from([0.0, -0.0, 1e-45, -1e-45, 1.1754944e-38, LARGEST, -LARGEST, 1.0, -0.5]),
).map(lambda x: float(np.float32(x)))
ORDINARY = st.floats(-1024, 1024, width=32).map(lambda x: x if abs(x) > 2**-40 else 0.0)
CONTRIBUTIONS = st.one_of(st.integers(1, 300), st.sampled_from([1024, 27600, 2**24 - 1, 2**24]))


@st.composite
def steps(
    draw: st.DrawFn, elements: st.SearchStrategy[float] = ELEMENTS, most_ranks: int = 5
) -> list[list[Tensor]]:
    """Gradients of a few tensors on a few ranks: the result is indexed by rank, then tensor."""
    sizes = draw(st.lists(st.integers(0, 6), min_size=1, max_size=5))
    ranks = draw(st.integers(1, most_ranks))
    return [
        [torch.tensor(draw(st.lists(elements, min_size=size, max_size=size))) for size in sizes]
        for _ in range(ranks)
    ]


def agreed(ranks: list[list[Tensor]]) -> Tensor:
    """What a reduction by maximum gives every rank."""
    return torch.stack([wire.magnitudes(gradients) for gradients in ranks]).amax(0)


def unit(magnitude: float, contributions: int) -> Fraction:
    """The least power of two that meets the promise, by trying them in turn."""
    limit = (2**31 - 1) // contributions
    exponent = -126
    while Fraction(magnitude) > limit * Fraction(2) ** exponent:
        exponent += 1
    return Fraction(2) ** exponent


def integers(gradient: Tensor, magnitude: float, contributions: int) -> list[int]:
    """Quantised elements; `round` of a fraction breaks ties to even."""
    step = unit(magnitude, contributions)
    return [round(Fraction(value) / step) for value in gradient.double().flatten().tolist()]


def nearest_float32(value: Fraction) -> float:
    """The float32 nearest to a rational, ties to even."""
    if value == 0:
        return 0.0
    exponent = math.floor(math.log2(abs(value)))
    exponent += 1 if abs(value) >= Fraction(2) ** (exponent + 1) else 0
    exponent -= 1 if abs(value) < Fraction(2) ** exponent else 0
    last_place = Fraction(2) ** max(exponent - 23, -149)
    rounded = round(value / last_place) * last_place
    return float(rounded) if abs(rounded) <= Fraction(LARGEST) else math.copysign(math.inf, value)


@QUICK
@given(steps(), CONTRIBUTIONS)
def test_integers_are_those_of_exact_arithmetic(
    ranks: list[list[Tensor]], contributions: int
) -> None:
    magnitudes = agreed(ranks)
    for gradients in ranks:
        expected = [
            integer
            for gradient, magnitude in zip(gradients, magnitudes.tolist(), strict=True)
            for integer in integers(gradient, magnitude, contributions)
        ]
        assert wire.to_wire(gradients, magnitudes, contributions).tolist() == expected


@QUICK
@given(steps(st.floats(-1e30, 1e30, allow_subnormal=False)), CONTRIBUTIONS)
def test_double_gradients_are_quantised_from_all_their_bits(
    ranks: list[list[Tensor]], contributions: int
) -> None:
    (gradients, *_) = [[g.double() / 3 for g in gradients] for gradients in ranks]
    magnitudes = wire.magnitudes(gradients)
    flat = wire.to_wire(gradients, magnitudes, contributions).tolist()
    for gradient, magnitude in zip(gradients, magnitudes.tolist(), strict=True):
        true = max(map(abs, gradient.tolist()), default=0.0)
        assert Fraction(true) <= Fraction(magnitude)
        assert magnitude == 0 or float(np.nextafter(np.float32(magnitude), np.float32(0))) < true
        own = [flat.pop(0) for _ in range(gradient.numel())]
        assert own == integers(gradient, magnitude, contributions)


@QUICK
@given(
    steps(),
    st.sampled_from([torch.float16, torch.bfloat16]),
    st.integers(1, 64),
    st.integers(1, 64),
)
def test_halves_are_quantised_as_the_float32_they_equal(
    ranks: list[list[Tensor]], dtype: torch.dtype, contributions: int, divisor: int
) -> None:
    halves = [gradient.nan_to_num().clamp(-6e4, 6e4).to(dtype) for gradient in ranks[0]]
    singles = [half.float() for half in halves]
    magnitudes = wire.magnitudes(halves)
    assert magnitudes.tolist() == wire.magnitudes(singles).tolist()
    flat = wire.to_wire(halves, magnitudes, contributions)
    assert flat.tolist() == wire.to_wire(singles, magnitudes, contributions).tolist()
    found = wire.from_wire(flat, magnitudes, halves, contributions, divisor)
    wanted = wire.from_wire(flat, magnitudes, singles, contributions, divisor)
    for half, single in zip(found, wanted, strict=True):
        assert half.dtype is dtype
        assert torch.equal(half, single.to(dtype))


@QUICK
@given(steps(), st.randoms(use_true_random=False))
def test_sums_do_not_depend_on_order_or_nesting(
    ranks: list[list[Tensor]], source: random.Random
) -> None:
    magnitudes = agreed(ranks)
    parts = [wire.to_wire(gradients, magnitudes, len(ranks)) for gradients in ranks]
    in_order = torch.stack(parts).sum(0, dtype=torch.int32)
    columns = zip(*(part.tolist() for part in parts), strict=True)
    assert in_order.tolist() == [sum(column) for column in columns]
    while len(parts) > 1:  # any two partial sums next, as in any tree, ring or torus
        a = parts.pop(source.randrange(len(parts)))
        b = parts.pop(source.randrange(len(parts)))
        parts.append(a + b)
    assert torch.equal(parts[0], in_order)


@QUICK
@given(steps(), st.integers(0, 60), st.integers(1, 70))
def test_mean_is_within_half_a_unit_and_correctly_rounded(
    ranks: list[list[Tensor]], spare: int, divisor: int
) -> None:
    contributions = len(ranks) + spare
    magnitudes = agreed(ranks)
    total = sum(wire.to_wire(gradients, magnitudes, contributions) for gradients in ranks)
    means = wire.from_wire(total, magnitudes, ranks[0], contributions, divisor)
    rest = total.tolist()
    for index, mean in enumerate(means):
        step = unit(magnitudes[index].item(), contributions)
        for place, found in enumerate(mean.tolist()):
            decoded = rest.pop(0) * step / divisor
            assert found == nearest_float32(decoded)
            exact = sum(Fraction(gradients[index][place].item()) for gradients in ranks) / divisor
            assert abs(decoded - exact) <= len(ranks) * step / 2 / divisor
    assert not rest


@QUICK
@given(CONTRIBUTIONS, st.integers(-149, 127), st.floats(1, 2, exclude_max=True, width=32))
def test_contributions_at_the_extreme_do_not_overflow(
    contributions: int, exponent: int, mantissa: float
) -> None:
    value = float(np.float32(math.ldexp(mantissa, exponent)))
    for extreme in (value, -value, math.copysign(LARGEST, value)):
        gradient = [torch.tensor([extreme])]
        (sent,) = wire.to_wire(gradient, wire.magnitudes(gradient), contributions).tolist()
        assert abs(sent) * contributions <= 2**31 - 1
        # The unit is the least one, so at least a quarter of the range is used.
        if abs(extreme) >= 2.0**-90:
            assert abs(sent) * 2 >= (2**31 - 1) // contributions - 1


@QUICK
@given(steps(), st.data())
def test_groups_do_not_change_bits(ranks: list[list[Tensor]], data: st.DataObject) -> None:
    def reduce(indices: list[int]) -> list[Tensor]:
        mine = [[gradients[i] for i in indices] for gradients in ranks]
        magnitudes = agreed(mine)
        total = sum(wire.to_wire(gradients, magnitudes, 8) for gradients in mine)
        return list(wire.from_wire(total, magnitudes, mine[0], 8, len(ranks)))

    count = len(ranks[0])
    whole = reduce(list(range(count)))
    order = data.draw(st.permutations(range(count)))
    cut = data.draw(st.integers(0, count))
    split = dict(zip(order, [*reduce(order[:cut]), *reduce(order[cut:])], strict=True))
    for index, expected in enumerate(whole):
        assert torch.equal(split[index], expected)


@QUICK
@given(steps(ORDINARY, most_ranks=8), st.data())
def test_layout_of_ranks_does_not_change_bits(
    ranks: list[list[Tensor]], data: st.DataObject
) -> None:
    """Micro-batches summed locally first, on any number of ranks, against one rank for each."""
    magnitudes = agreed(ranks)
    parts = [wire.to_wire(gradients, magnitudes, 16) for gradients in ranks]
    world = data.draw(st.integers(1, len(parts)))
    local = [sum(parts[rank::world]) for rank in range(world)]
    alone, together = sum(parts), sum(local)
    for a, b in zip(
        wire.from_wire(alone, magnitudes, ranks[0], 16, len(ranks)),
        wire.from_wire(together, magnitudes, ranks[0], 16, len(ranks)),
        strict=True,
    ):
        assert torch.equal(a, b)


@QUICK
@given(steps(ORDINARY), st.integers(-40, 40), CONTRIBUTIONS)
def test_scaling_by_a_power_of_two_commutes(
    ranks: list[list[Tensor]], power: int, contributions: int
) -> None:
    gradients, factor = ranks[0], 2.0**power
    scaled = [gradient * factor for gradient in gradients]
    before, after = wire.magnitudes(gradients), wire.magnitudes(scaled)
    flat = wire.to_wire(gradients, before, contributions)
    assert torch.equal(wire.to_wire(scaled, after, contributions), flat)
    for small, large in zip(
        wire.from_wire(flat, before, gradients, contributions, 3),
        wire.from_wire(flat, after, scaled, contributions, 3),
        strict=True,
    ):
        assert torch.equal(small * factor, large)


@QUICK
@given(steps(), st.sampled_from([math.inf, -math.inf, math.nan]), st.data())
def test_poison_on_one_rank_shows_in_its_tensor_only(
    ranks: list[list[Tensor]], poison: float, data: st.DataObject
) -> None:
    victim = data.draw(st.sampled_from(ranks))
    full = [index for index, gradient in enumerate(victim) if gradient.numel()]
    if not full:
        return
    index = data.draw(st.sampled_from(full))
    clean = sum(wire.to_wire(gradients, agreed(ranks), 8) for gradients in ranks)
    expected = wire.from_wire(clean, agreed(ranks), victim, 8, 2)
    victim[index][data.draw(st.integers(0, victim[index].numel() - 1))] = poison
    magnitudes = agreed(ranks)
    assert magnitudes[index] == math.inf
    parts = [wire.to_wire(gradients, magnitudes, 8) for gradients in ranks]
    sizes = [gradient.numel() for gradient in victim]
    assert not any(part.split(sizes)[index].any() for part in parts)
    found = wire.from_wire(sum(parts), magnitudes, victim, 8, 2)
    for place, (mean, wanted) in enumerate(zip(found, expected, strict=True)):
        assert mean.isnan().all() if place == index else torch.equal(mean, wanted)
