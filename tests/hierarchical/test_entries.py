"""Cross approximation, and what it misses when nobody checks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from graphopt import hierarchical as h
from graphopt.hierarchical.entries import Cross
from tests.hierarchical.oracles import KERNELS, distances, geometries, points
from tests.hierarchical.test_build import TOLERANCES, check

_DOUBLE = torch.float64


class Counted:
    """Entries of a matrix, and how many were asked for at once at most."""

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self.most = 0

    def __call__(self, rows: Tensor, columns: Tensor) -> Tensor:
        self.most = max(self.most, len(rows) * len(columns))
        return self.values[rows][:, columns]


@settings(max_examples=12, deadline=None)
@given(
    name=st.sampled_from(["exponential", "log", "inverse", "gaussian"]),
    geometry=geometries(),
    n=st.integers(1, 150),
    rule=st.sampled_from([h.Strong(), h.Weak(), h.Flat()]),
    goal=TOLERANCES,
    probed=st.booleans(),
)
def test_kernels_entry_by_entry(
    name: str,
    geometry: tuple[str, int],
    n: int,
    rule: h.Strong | h.Weak | h.Flat,
    goal: tuple[float, torch.dtype],
    probed: bool,
) -> None:
    x = points(geometry[0], n, geometry[1])
    exact = KERNELS[name][1](distances(x, x))
    if not bool(exact.any()):
        return
    found = h.from_entries(
        Counted(exact),
        h.by_points(x, 16),
        tolerance=goal[0],
        rule=rule,
        dtype=goal[1],
        product=(lambda w: exact @ w) if probed else None,
    )
    check(found, exact, goal[0])
    assert found.confidence == 1 or probed


def _isolated(where: tuple[int, int]) -> Tensor:
    """A smooth matrix with a small sub-block that no row or column beside it shows."""
    n = 512
    i = torch.arange(n, dtype=_DOUBLE)
    values = 1e-3 / (1 + (i[:, None] - i[None, :]).abs())
    values[:256, 256:] = 0
    values[:256, 256:][:40, :40] = 1e-3
    a, b = where
    values[a : a + 10, b : b + 10] += torch.rand(10, 10, dtype=_DOUBLE)
    return values


@pytest.mark.parametrize("where", [(100, 400), (240, 260), (0, 500)])
def test_isolated_blocks_are_not_missed(where: tuple[int, int]) -> None:
    values = _isolated(where)
    tree = h.by_index(512, 64)
    found = h.from_entries(Counted(values), tree, tolerance=1e-6)
    assert found.confidence == 1
    check(found, values, 1e-6)


def test_without_the_check_they_would_be() -> None:
    values = _isolated((100, 400))
    block = values[:256, 256:]
    cross = Cross(Counted(block), (256, 256), 128)
    cross.extend(0, 1e-9)
    missed = block - cross.left @ cross.right.T
    assert float(missed.norm()) > 1


def test_random_products_notice_as_well() -> None:
    values = _isolated((100, 400))
    tree = h.by_index(512, 64)
    found = h.from_entries(Counted(values), tree, tolerance=1e-6, product=lambda w: values @ w)
    # They said that something was missing; then all entries were compared.
    assert found.confidence == 1
    check(found, values, 1e-6)


def test_bounds_of_random_products_hold_as_often_as_stated() -> None:
    i = torch.arange(300, dtype=_DOUBLE)
    values = 1 / (1 + (i[:, None] - i[None, :]).abs())
    for leaf in (20, 30, 50):
        for tolerance in (1e-2, 1e-4, 1e-6):
            found = h.from_entries(
                Counted(values),
                h.by_index(300, leaf),
                tolerance=tolerance,
                product=lambda w: values @ w,
            )
            assert found.confidence == 1 - 1e-6
            # Not far above: within the factor that the probability costs.
            assert 0.2 < check(found, values, tolerance) < 1


def test_entries_are_never_held_together() -> None:
    n = 2000
    i = torch.arange(n, dtype=_DOUBLE)
    entries = Counted(torch.exp(-(i[:, None] - i[None, :]).abs() / 500))
    found = h.from_entries(entries, h.by_index(n, 125), tolerance=1e-8)
    assert entries.most <= 2**18
    check(found, entries.values, 1e-8)
    assert found.nbytes < 0.1 * entries.values.nbytes
