"""Numbers of backward passes travel exactly, in whatever type a message has."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from graphopt.runtime.group_gradients.stamp import Stamp, modulus


@given(
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    size=st.integers(1, 300),
    passes=st.integers(0, 10**9),
    data=st.data(),
)
def test_sums_of_passes_are_exact(dtype: torch.dtype, size: int, passes: int, data: Any) -> None:
    stamp = Stamp(0, dtype, size)
    order = data.draw(st.permutations(range(min(size, 6))))
    numbers = [stamp.of(passes, torch.device("cpu")) for _ in range(size)]
    total = sum(numbers[1:], numbers[0])
    assert stamp.agrees(total, passes)
    if size > 1 and modulus(dtype, size) > 1:
        numbers[order[0] % size] = stamp.of(passes + 1, torch.device("cpu"))
        assert not stamp.agrees(sum(numbers[1:], numbers[0]), passes)


@given(passes=st.lists(st.integers(0, 10**9), min_size=1, max_size=9))
def test_by_maximum(passes: list[int]) -> None:
    stamp = Stamp(0, torch.float32, len(passes), maximum=True)
    total = torch.stack([stamp.of(p, torch.device("cpu")) for p in passes]).amax(0)
    numbers = {p % modulus(torch.float32, len(passes)) for p in passes}
    assert all(stamp.agrees(total, p) == (len(numbers) == 1) for p in passes)
