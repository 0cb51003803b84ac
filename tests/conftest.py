"""Settings shared by all tests."""

from __future__ import annotations

import gc
import os
from itertools import count

# Before MKL is loaded. On an AMD processor its default kernels gave K-FAC in two stages other bits
# than in one process.
os.environ["MKL_CBWR"] = os.environ.get("MKL_CBWR", "AVX2,STRICT")

import pytest
import torch
from hypothesis import settings
from hypothesis.internal.conjecture import providers
from hypothesis.internal.constants_ast import Constants
from torch.distributions import Distribution

from graphopt.capture.kept import store

# The suite tries the same examples every time; `make explore` tries new ones.
settings.register_profile("same", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None, print_blob=True, max_examples=500)
settings.load_profile("same")
# Nor may they depend on which other tests a process has imported, whose constants would be tried.
providers._get_local_constants = Constants

if "PYTEST_XDIST_WORKER" in os.environ:  # one core per worker
    torch.set_num_threads(1)

# An eighth of the time would go into looking for garbage: captures make many objects that live.
gc.set_threshold(50_000, 20, 100)


def pytest_collection_finish() -> None:
    """What is imported by now is never garbage."""
    gc.freeze()


_NUMBERS = count()


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Cached choices must not leak between tests or from the user's own runs."""
    # Not `mktemp`, which looks through the folders of all tests so far; the cache makes its own.
    cache = tmp_path_factory.getbasetemp() / "caches" / str(next(_NUMBERS))
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    monkeypatch.setattr(store, "_warned", set())  # of which folders and entries a process was told


@pytest.fixture(autouse=True)
def _validated_distributions(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a new process has it: the first `torch.compile` turns it off for all tests after."""
    monkeypatch.setattr(Distribution, "_validate_args", True)
