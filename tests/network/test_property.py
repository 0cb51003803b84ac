"""Invariants of the cost of an all-reduce."""

from __future__ import annotations

from dataclasses import replace
from math import log, sqrt

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphopt.network import algorithms
from graphopt.network.algorithms import Link
from graphopt.network.clusters import ALGORITHMS, CLUSTERS, Cluster
from graphopt.network.nccl import Algorithm, Protocol, Tuner
from graphopt.network.straggler import expected_maximum

FLAT = (
    algorithms.ring,
    algorithms.recursive_doubling,
    algorithms.halving_doubling,
    algorithms.binomial_tree,
    algorithms.double_binary_tree,
)
SIZES = st.floats(0, 1e9)
RANKS = st.integers(1, 30_000)
LINKS = st.builds(
    Link,
    st.floats(0, 1e-3),
    st.floats(1e-12, 1e-8),
    st.floats(0, 1e-9),
)
CLUSTER = st.sampled_from(sorted(CLUSTERS)).map(CLUSTERS.__getitem__)


def algorithm_of(cluster: Cluster, name: str) -> str:
    return name if cluster.generation or not name.startswith("nccl") else "auto"


@given(st.sampled_from(FLAT), SIZES, SIZES, RANKS, LINKS)
def test_more_bytes_never_cost_less(form, a: float, b: float, ranks: int, link: Link) -> None:
    small, large = sorted((a, b))
    assert form(small, ranks, link) <= form(large, ranks, link)


@given(st.sampled_from(FLAT), SIZES, RANKS, LINKS, st.floats(1, 1000))
def test_more_bandwidth_is_never_slower(
    form, size: float, ranks: int, link: Link, more: float
) -> None:
    fast = replace(link, per_byte=link.per_byte / more)
    assert form(size, ranks, fast) <= form(size, ranks, link)


@given(SIZES, st.integers(2, 30_000), LINKS)
def test_ring_is_its_closed_form(size: float, ranks: int, link: Link) -> None:
    hops = 2 * (ranks - 1)
    bytes_each = size / ranks
    expected = hops * (link.latency + bytes_each * link.per_byte)
    expected += (ranks - 1) * bytes_each * link.reduce
    assert algorithms.ring(size, ranks, link) == pytest.approx(expected, rel=1e-9)


@given(SIZES, st.integers(1, 64), LINKS, LINKS)
def test_hierarchical_of_one_node_is_the_ring_inside(
    size: float, local: int, inside: Link, between: Link
) -> None:
    one_node = algorithms.hierarchical(size, local, 1, inside, between)
    assert one_node == algorithms.ring(size, local, inside)


@given(SIZES, st.integers(1, 200), st.integers(1, 200), LINKS, LINKS)
def test_torus_of_one_row_is_a_ring(size: float, x: int, y: int, a: Link, b: Link) -> None:
    assert algorithms.torus(size, x, 1, a, b) == algorithms.ring(size, x, a)
    assert algorithms.torus(size, 1, y, a, b) == algorithms.ring(size, y, b)
    assert algorithms.torus(size, x, y, a, b) >= algorithms.ring(size, x, a)


@given(CLUSTER, RANKS, st.sampled_from(("auto", *ALGORITHMS)), SIZES, SIZES)
def test_every_curve_of_every_cluster_is_non_decreasing(
    cluster: Cluster, world: int, name: str, a: float, b: float
) -> None:
    curve = cluster.all_reduce(world, algorithm_of(cluster, name))
    small, large = sorted((a, b))
    assert 0 <= curve(small) <= curve(large)


@given(CLUSTER, RANKS, st.sampled_from(("auto", *ALGORITHMS)), SIZES, st.floats(1, 100))
def test_a_cluster_with_more_bandwidth_is_never_slower(
    cluster: Cluster, world: int, name: str, size: float, more: float
) -> None:
    name = algorithm_of(cluster, name)
    better = replace(
        cluster,
        intra_bandwidth=cluster.intra_bandwidth * more,
        inter_bandwidth=cluster.inter_bandwidth * more,
    )
    slow, fast = cluster.all_reduce(world, name)(size), better.all_reduce(world, name)(size)
    assert fast <= slow * (1 + 1e-12)


@given(CLUSTER, RANKS, SIZES)
def test_auto_is_the_cheapest_of_the_usual(cluster: Cluster, world: int, size: float) -> None:
    auto = cluster.all_reduce(world)(size)
    for name in cluster.usual:
        assert auto <= cluster.all_reduce(world, name)(size) * (1 + 1e-12)


@given(st.integers(1, 8), st.integers(1, 5000), SIZES)
def test_nccl_takes_the_cheapest_pair(local: int, nodes: int, size: float) -> None:
    tuner = Tuner(local, nodes, 120e9, 23e9)
    best, algorithm, protocol = tuner.best(size)
    assert best == tuner.seconds(size, algorithm, protocol)
    assert best == min(tuner.seconds(size, a, p) for a in Algorithm for p in Protocol)


@given(st.integers(2, 100_000))
def test_the_slowest_of_more_ranks_is_slower(ranks: int) -> None:
    assert expected_maximum(ranks) < expected_maximum(ranks + ranks // 2 + 1)
    assert expected_maximum(ranks) < sqrt(2 * log(ranks))
