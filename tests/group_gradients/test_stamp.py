"""Numbers of backward passes travel exactly, in whatever type a message has."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from graphopt.runtime.group_gradients.stamp import LEAST, Stamp, numbered

CPU = torch.device("cpu")


@given(
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    size=st.integers(1, 1100),
    passes=st.integers(0, 10**9),
    slip=st.integers(1, LEAST - 1),
    odd=st.integers(0, 10**6),
)
def test_sums_of_passes_are_exact(
    dtype: torch.dtype, size: int, passes: int, slip: int, odd: int
) -> None:
    stamps = [Stamp(0, dtype, size, rank) for rank in range(size)]
    assert stamps[0].modulus >= LEAST
    assert stamps[0].length * stamps[0].sharing >= size
    numbers = [stamp.of(passes, CPU) for stamp in stamps]
    total = sum(numbers[1:], numbers[0])
    assert all(stamp.agrees(total, passes) for stamp in (stamps[0], stamps[-1]))
    if size > 1:
        numbers[odd % size] = stamps[odd % size].of(passes + slip, CPU)
        assert not stamps[0].agrees(sum(numbers[1:], numbers[0]), passes)


def test_a_thousand_ranks_on_a_bfloat16_wire() -> None:
    stamp = Stamp(0, torch.bfloat16, 1024, 0)
    assert (stamp.sharing, stamp.modulus, stamp.length) == (17, 16, 61)
    assert Stamp(0, torch.float32, 1024, 0).length == 1


@given(passes=st.lists(st.integers(0, 10**9), min_size=1, max_size=9))
def test_by_maximum(passes: list[int]) -> None:
    stamp = Stamp(0, torch.float32, len(passes), 0, maximum=True)
    total = torch.stack([stamp.of(p, CPU) for p in passes]).amax(0)
    numbers = {p % stamp.modulus for p in passes}
    assert all(stamp.agrees(total, p) == (len(numbers) == 1) for p in passes)


@given(passes=st.integers(0, 10**6), one=st.integers(-20, 40), other=st.integers(-20, 40))
def test_scales_of_losses_are_in_the_number(passes: int, one: int, other: int) -> None:
    found = numbered(passes, 2.0**one), numbered(passes, 2.0**other)
    assert (found[0] == found[1]) == (one == other)
    stamp = Stamp(0, torch.float32, 2, 0)
    if one != other:
        total = stamp.of(found[0], CPU) + stamp.of(found[1], CPU)
        assert not stamp.agrees(total, found[0])
