"""Sizes: the dynamic programme against brute force, and what goes wrong."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphopt.data import Buckets, bucket
from graphopt.errors import ArgumentError

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=25)


def positions(lengths: list[int], sizes: tuple[int, ...]) -> int:
    """What all examples take, each padded to the smallest size that holds it."""
    return sum(min(size for size in sizes if size >= length) for length in lengths)


def brute_force(lengths: list[int], k: int, multiple: int) -> int:
    """The least over all choices of at most k sizes, be they lengths of examples or not."""
    top = -(-max(lengths) // multiple) * multiple
    others = sorted({-(-length // multiple) * multiple for length in lengths} - {top})
    return min(
        positions(lengths, (*chosen, top))
        for n in range(min(k, len(others) + 1))
        for chosen in itertools.combinations(others, n)
    )


@given(st.lists(st.integers(1, 14), min_size=1, max_size=12), st.integers(1, 5), st.integers(1, 4))
def test_sizes_between_lengths_are_no_better(lengths: list[int], k: int, multiple: int) -> None:
    found = bucket(lengths, k=k, multiple=multiple)
    all_sizes = range(multiple, -(-max(lengths) // multiple) * multiple + 1, multiple)
    least = min(
        positions(lengths, sizes)
        for n in range(1, min(k, len(all_sizes)) + 1)
        for sizes in itertools.combinations(all_sizes, n)
        if sizes[-1] >= max(lengths)
    )
    assert positions(lengths, found.sizes) == least


@given(LENGTHS, st.integers(1, 5), st.integers(1, 9))
def test_least_padding(lengths: list[int], k: int, multiple: int) -> None:
    found = bucket(lengths, k=k, multiple=multiple)
    assert len(found.sizes) <= k
    assert all(size % multiple == 0 for size in found.sizes)
    assert positions(lengths, found.sizes) == brute_force(lengths, k, multiple)


@given(LENGTHS, st.floats(0.01, 0.9))
def test_fewest_sizes(lengths: list[int], padding: float) -> None:
    found = bucket(lengths, padding=padding)
    assert found.padding(lengths) <= padding
    fewer = len(found.sizes) - 1
    if fewer:
        taken = brute_force(lengths, fewer, 1)
        assert (taken - sum(lengths)) / taken > padding


@given(LENGTHS)
def test_share_and_sizes_agree(lengths: list[int]) -> None:
    found = bucket(lengths, k=3)
    sizes = [found.size_of(length) for length in lengths]
    assert all(size >= length for size, length in zip(sizes, lengths, strict=True))
    assert sum(sizes) == positions(lengths, found.sizes)
    assert found.padding(lengths) == pytest.approx(1 - sum(lengths) / sum(sizes))


def test_as_many_sizes_as_lengths_pad_nothing() -> None:
    assert bucket([5, 3, 3, 9], k=8).sizes == (3, 5, 9)
    assert bucket([5, 3, 3, 9], k=8).padding([5, 3, 3, 9]) == 0


def test_a_hundred_thousand_lengths() -> None:
    # Equally many of each: equal steps are the best.
    found = bucket(np.arange(1, 100_001), k=4)
    assert found.sizes == (25_000, 50_000, 75_000, 100_000)


@pytest.mark.parametrize(
    "lengths", [[4, 7, 7], np.array([4, 7, 7], dtype=np.uint16), torch.tensor([4, 7, 7])]
)
def test_kinds_of_lengths(lengths: object) -> None:
    assert bucket(lengths, k=2).sizes == (4, 7)  # type: ignore[arg-type]


def test_report() -> None:
    assert Buckets((4, 8)).report([3, 4, 8]) == (
        "2 sizes for 3 examples: 6.2% padding\n"
        "  4: 2 examples, 12.5% padding\n"
        "  8: 1 example, 0.0% padding"
    )


@pytest.mark.parametrize(
    ("lengths", "options", "message"),
    [
        ([], {"k": 2}, "there are no lengths"),
        ([3, 2.5], {"k": 2}, "lengths[1]"),
        ([3, "4"], {"k": 2}, "lengths[1]"),
        ([True, False], {"k": 2}, "True is no length"),
        ([3.0], {"k": 2}, "3.0 is no length"),
        ([3, 0], {"k": 2}, "leave empty examples out"),
        ([3, -1], {"k": 2}, "-1 is no length"),
        ([[3], [4]], {"k": 2}, "no flat list"),
        ([[3], [4, 5]], {"k": 2}, "no flat list"),
        ([3], {}, "neither the number of sizes nor a share"),
        ([3], {"k": 0}, "k=0"),
        ([3], {"k": 1.5}, "k=1.5"),
        ([3], {"k": True}, "k=True"),
        ([3], {"k": 1, "multiple": 0}, "multiple=0"),
        ([3], {"padding": 0.0}, "padding=0.0"),
        ([3], {"padding": 1}, "padding=1"),
        ([3], {"padding": float("nan")}, "padding=nan"),
        ([3], {"padding": "5%"}, "padding='5%'"),
        ([1, 2, 3, 4], {"k": 2, "padding": 0.1}, "it takes k=3"),
        (list(range(1, 40)), {"k": 2, "padding": 0.01}, "it takes more than k=8"),
        ([1, 9], {"k": 1, "padding": 0.1}, "1 size leaves 0.444"),
        ([3, 5], {"padding": 0.1, "multiple": 8}, "multiples of 8 leave 0.5"),
    ],
)
def test_bad_input(lengths: list[int], options: dict[str, float], message: str) -> None:
    with pytest.raises(ArgumentError) as error:
        bucket(lengths, **options)  # type: ignore[arg-type]
    assert message in str(error.value)


@pytest.mark.parametrize("sizes", [(), (4, 4), (8, 4), (0, 4), (4.5,)])
def test_bad_sizes(sizes: tuple[int, ...]) -> None:
    with pytest.raises(ArgumentError, match="no rising whole numbers"):
        Buckets(sizes)


def test_a_length_above_the_largest_size() -> None:
    with pytest.raises(ArgumentError, match=r"length 9 is above the largest size, 8") as error:
        Buckets((4, 8)).which([3, 9])
    assert error.value.where == "lengths[1]"
    with pytest.raises(ArgumentError, match="above the largest"):
        Buckets((4, 8)).size_of(9)
    with pytest.raises(ArgumentError, match="'a' is no length"):
        Buckets((4, 8)).size_of("a")  # type: ignore[arg-type]


def test_workers_of_a_loader_import_no_compiler() -> None:
    code = "import sys, graphopt.data; sys.exit('torch._dynamo' in sys.modules)"
    root = Path(__file__).parents[2]
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
