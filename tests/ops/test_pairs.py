"""Two int16 lanes in one int32 word: sums of words are words of sums."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import graphopt.ops  # noqa: F401  (registers the operators)
from graphopt.errors import ArgumentError

ops = torch.ops.graphopt
LEAST, MOST = -(2**15), 2**15 - 1
integers = st.integers(LEAST, MOST) | st.sampled_from([LEAST, LEAST + 1, -1, 0, 1, MOST])


@given(st.lists(integers, max_size=9))
def test_words_unpack_to_what_was_packed(values: list[int]) -> None:
    lanes = torch.tensor(values, dtype=torch.int16)
    words = ops.pack_pairs(lanes)
    padded = [*values, 0]
    assert [word % 2**32 for word in words.tolist()] == [
        ((padded[i + 1] << 16) + padded[i]) % 2**32 for i in range(0, len(values), 2)
    ]
    assert ops.unpack_pairs(words, len(values)).tolist() == values


@st.composite
def summands(draw: st.DrawFn) -> list[list[int]]:
    """Up to 16 lists of lanes whose sums, in the end, fit int16; on the way they need not."""
    count, width = draw(st.integers(1, 16)), draw(st.integers(1, 5))
    totals = draw(st.lists(integers, min_size=width, max_size=width))
    rows = [draw(st.lists(integers, min_size=width, max_size=width)) for _ in range(count - 1)]
    last = [total - sum(lane) for total, *lane in zip(totals, *rows, strict=True)]
    # What is left over goes to as many summands as it takes to fit.
    while any(not LEAST <= x <= MOST for x in last):
        row = [max(LEAST, min(MOST, x)) for x in last]
        rows.append(row)
        last = [x - y for x, y in zip(last, row, strict=True)]
    return [*rows, last]


@given(summands())
def test_sums_of_words_are_words_of_sums(rows: list[list[int]]) -> None:
    words = [ops.pack_pairs(torch.tensor(row, dtype=torch.int16)) for row in rows]
    total = torch.stack(words).sum(0, dtype=torch.int32)
    found = ops.unpack_pairs(total, len(rows[0])).tolist()
    assert found == [sum(lane) for lane in zip(*rows, strict=True)]


@pytest.mark.parametrize("ranks", [1, 2, 3, 8, 16])
def test_the_largest_lanes_of_every_number_of_ranks(ranks: int) -> None:
    for even in (MOST // ranks, -(2**15) // ranks, 0, -1):
        for odd in (MOST // ranks, -(2**15) // ranks, 0, -1):
            lanes = torch.tensor([even, odd, odd], dtype=torch.int16)
            if not all(LEAST <= ranks * lane <= MOST for lane in (even, odd)):
                continue
            total = ops.pack_pairs(lanes).clone()
            for _ in range(ranks - 1):
                total += ops.pack_pairs(lanes)
            assert ops.unpack_pairs(total, 3).tolist() == [ranks * x for x in (even, odd, odd)]


def test_layouts_and_tracing() -> None:
    lanes = torch.arange(-6, 6, dtype=torch.int16).view(3, 4)
    flat = ops.pack_pairs(lanes.t())
    assert torch.equal(flat, ops.pack_pairs(lanes.t().contiguous()))
    assert torch.equal(ops.unpack_pairs(flat, 12).view(4, 3), lanes.t())
    assert ops.pack_pairs(lanes[:0]).shape == (0,)
    for count in (1, 4, 5):
        lanes = torch.ones(count, dtype=torch.int16)
        torch.library.opcheck(ops.pack_pairs.default, (lanes,))
        torch.library.opcheck(ops.unpack_pairs.default, (ops.pack_pairs(lanes), count))


@pytest.mark.parametrize(
    ("words", "count"),
    [
        (torch.zeros(2, dtype=torch.int32), 5),
        (torch.zeros(2, dtype=torch.int32), 2),
        (torch.zeros(2, dtype=torch.int64), 4),
        (torch.zeros(2, 1, dtype=torch.int32), 4),
    ],
)
def test_bad_words(words: Tensor, count: int) -> None:
    with pytest.raises(ArgumentError, match=f"{count} numbers are in") as caught:
        ops.unpack_pairs(words, count)
    assert caught.value.hint


def test_bad_lanes() -> None:
    with pytest.raises(ArgumentError, match=r"not torch\.int32"):
        ops.pack_pairs(torch.zeros(2, dtype=torch.int32))
