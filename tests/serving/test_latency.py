"""Histograms against sorted lists."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from graphopt.runtime.serving.latency import PER_DOUBLING, Histogram


def _of(values: list[float]) -> Histogram:
    histogram = Histogram()
    for value in values:
        histogram.add(value)
    return histogram


@given(st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=200), st.floats(0, 1))
def test_quantiles_are_just_above_the_true_ones(values: list[float], q: float) -> None:
    true = sorted(values)[max(1, math.ceil(q * len(values))) - 1]
    found = _of(values).quantile(q)
    assert true * (1 - 1e-9) <= found <= true * 2 ** (1 / PER_DOUBLING) * (1 + 1e-9)
    assert found <= max(values)


@given(st.lists(st.floats(0, 1e3), max_size=50))
def test_counts_and_sums(values: list[float]) -> None:
    histogram = _of(values)
    assert histogram.count == sum(histogram.buckets.values()) == len(values)
    assert math.isclose(histogram.total, math.fsum(values), abs_tol=1e-12)
    assert histogram.most == max(values, default=0.0)


def test_nothing_was_added() -> None:
    expected = {"count": 0, **{f"{k}_ms": 0.0 for k in ("mean", "p50", "p90", "p99", "max")}}
    assert Histogram().to_json() == expected


def test_a_copy_stays_as_it_was() -> None:
    histogram = _of([1e-3])
    before = histogram.copy()
    histogram.add(2e-3)
    assert (before.count, before.quantile(1.0)) == (1, 1e-3)
    assert (histogram.count, histogram.quantile(1.0)) == (2, 2e-3)
