"""Calls from threads and requests of callers that die: no error to others, nothing left behind."""

from __future__ import annotations

import threading

from benchmarks.load import serving, threads


def test_calls_of_mixed_sizes_from_eight_threads() -> None:
    found = threads(2)
    assert found["unexpected"] == 0, found["errors"]
    assert found["counts"]["answers"] > 100
    assert found["process"]["descriptors"]["end"] == found["process"]["descriptors"]["begin"]


def test_callers_that_die() -> None:
    before = threading.active_count()
    found = serving(4)
    assert found["unexpected"] == 0, found["errors"]
    counts = found["counts"]
    assert counts["answers"] > 100
    died = ("threads that died with a request under way", "clients that have gone")
    assert all(counts[what] > 0 for what in (*died, "futures taken back"))
    assert found["under way at the end"] == 0
    assert threading.active_count() <= before
