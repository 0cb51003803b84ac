"""Damaged files are refused by an error of our own, or mean something: a bounded share of all."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from benchmarks.fuzz_files import KINDS, RAW, run
from benchmarks.fuzz_texts import WRONG

COUNTS = {
    "texts": 600, "operators": 150, "plans": 1500, "states": 200, "files": 150, "caches": 300,
    "kept": 100,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    cache, state = os.environ.get("XDG_CACHE_HOME"), torch.get_rng_state()
    yield
    torch.set_rng_state(state)
    if cache is not None:
        os.environ["XDG_CACHE_HOME"] = cache


@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_refused_or_means_something(kind: str) -> None:
    found = run(kind, COUNTS[kind], seed=1_000_000)
    assert found[RAW] == 0
    assert found[WRONG] == 0
    assert found["refused"] > 0
    assert sum(found.values()) == COUNTS[kind]
