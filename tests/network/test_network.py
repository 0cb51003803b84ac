"""Costs of collectives against figures worked out by hand and against PyTorch's own tables."""

from __future__ import annotations

import subprocess
import sys
from math import pi, sqrt

import pytest

from graphopt.errors import ArgumentError
from graphopt.network import algorithms, nccl
from graphopt.network.algorithms import Link
from graphopt.network.clusters import ALGORITHMS, CLUSTERS, Cluster, cluster
from graphopt.network.nccl import Algorithm, Protocol, Tuner
from graphopt.network.negotiation import (
    NEGOTIATIONS,
    Negotiator,
    bit_vector,
    bit_vector_bytes,
    control_tree,
    coordinator,
)
from graphopt.network.straggler import delay, expected_maximum

LINK = Link(1.0, 0.1, 0.01)


@pytest.mark.parametrize(
    ("form", "ranks", "expected"),
    [
        (algorithms.ring, 4, 6 + 15 + 0.75),
        (algorithms.recursive_doubling, 4, 2 * 12),
        (algorithms.recursive_doubling, 6, 2 * 12 + 2 * 11 + 1),
        (algorithms.halving_doubling, 4, 4 + 15 + 0.75),
        (algorithms.halving_doubling, 5, 4 + 15 + 0.75 + 2 * 11 + 1),
        (algorithms.binomial_tree, 4, 2 * (2 * 11 + 1)),
        (algorithms.binomial_tree, 5, 3 * (2 * 11 + 1)),
        (algorithms.double_binary_tree, 4, 2 * (2 * 11 + 1)),
    ],
)
def test_closed_forms(form, ranks: int, expected: float) -> None:
    assert form(100.0, ranks, LINK) == pytest.approx(expected)
    assert form(100.0, 1, LINK) == 0


def test_a_pipelined_tree_pays_its_bytes_once() -> None:
    whole = algorithms.double_binary_tree(100.0, 8, LINK, piece=100.0)
    pieces = algorithms.double_binary_tree(100.0, 8, LINK, piece=1.0)
    assert whole == pytest.approx(algorithms.binomial_tree(100.0, 8, LINK))
    assert pieces == pytest.approx(6 + 100 * 0.21 + 2 * 0.21)


def test_hierarchical_and_torus() -> None:
    outer = Link(10.0, 1.0)
    inside = algorithms.ring(100.0, 2, LINK)
    assert algorithms.hierarchical(100.0, 2, 3, LINK, outer) == pytest.approx(
        inside + 40 + 2 * (2 / 3) * 100
    )
    assert algorithms.torus(100.0, 2, 3, LINK, outer) == pytest.approx(
        inside + 40 + 2 * (2 / 3) * 50
    )


@pytest.mark.parametrize(
    ("algorithm", "protocol", "milliseconds"),
    [
        (Algorithm.RING, Protocol.LL, 52.4),
        (Algorithm.RING, Protocol.SIMPLE, 285.2),
        (Algorithm.TREE, Protocol.LL, 0.133),
        (Algorithm.TREE, Protocol.SIMPLE, 0.384),
    ],
)
def test_latency_of_27600_gpus(
    algorithm: Algorithm, protocol: Protocol, milliseconds: float
) -> None:
    summit = Tuner(6, 4600, 120e9, 12e9)
    bare = summit.latency(algorithm, protocol, floor=False)
    assert 1e3 * bare == pytest.approx(milliseconds, rel=5e-3)
    assert summit.latency(algorithm, protocol) >= bare


def test_constants_are_those_pytorch_ships() -> None:
    theirs = pytest.importorskip("torch._inductor.comm_analysis")
    if not hasattr(theirs, "treeCorrectionFactor"):
        pytest.skip("this PyTorch has another table")
    assert [list(row) for row in nccl.BASE] == theirs.baseLat
    assert [[list(r) for r in table] for table in (nccl.NVLINK, nccl.PCI, nccl.NETWORK)] == (
        theirs.hwLat
    )
    assert [list(row) for row in nccl.CORRECTION] == theirs.treeCorrectionFactor
    assert [list(row) for row in nccl.LL_LIMIT.values()] == theirs.llMaxBws


@pytest.mark.parametrize("size", [1, 64, 4096, 1 << 20, 3 << 24, 1 << 30])
def test_one_node_agrees_with_pytorch(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = pytest.importorskip("torch._inductor.comm_analysis")
    if not hasattr(theirs, "_nccl_algo_time"):
        pytest.skip("this PyTorch has another model")
    monkeypatch.setattr(theirs.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(theirs, "get_gpu_type", lambda: theirs.NVIDIA_GPU_TYPE.HOPPER)
    monkeypatch.setattr(theirs, "_has_nvlink", lambda: True)
    tuner = Tuner(8, 1, 370e9, 50e9, "hopper")
    for algorithm in Algorithm:
        for protocol in Protocol:
            expected = theirs._nccl_algo_time(
                size, 8, theirs.NCCL_COLL.ALL_REDUCE, algorithm.value, protocol.value
            )
            mine = 1e6 * tuner.seconds(size, algorithm, protocol)
            assert mine == pytest.approx(expected, rel=1e-9), (algorithm, protocol)


def test_nccl_prefers_a_tree_at_scale_and_a_ring_for_large_messages() -> None:
    assert Tuner(6, 4600, 120e9, 23e9).best(1e6)[1] is Algorithm.TREE
    assert Tuner(8, 2, 370e9, 368e9, "hopper").best(1e9)[1] is Algorithm.RING
    assert Tuner(8, 2, 370e9, 368e9, "hopper").best(64)[2] is Protocol.LL


def test_bytes_of_the_bit_vector() -> None:
    assert [bit_vector_bytes(n) for n in (0, 61, 62, 300)] == [8, 8, 16, 40]


def test_negotiation() -> None:
    link = Link(2.0, 0.5)
    assert coordinator(9, 3, 1.0, 0.1, link) == pytest.approx(8 * 1.3 + 4 * 2)
    assert coordinator(1, 3, 1.0, 0.1, link) == 0
    assert bit_vector(8, 300, Link(2.0, 0.0)) == 12
    assert control_tree(64, 4, 1.0) == 12
    assert control_tree(65, 4, 1.0) == 16
    assert control_tree(1, 4, 1.0) == 0


def test_a_negotiator_uses_its_own_costs() -> None:
    link = Link(2.0, 0.5)
    costs = {"message": 1.0, "tensor": 0.1, "radix": 4}
    found = {n: Negotiator(n, **costs).seconds(64, 3, 300, link) for n in NEGOTIATIONS}
    assert found == {
        "none": 0.0,
        "coordinator": coordinator(64, 3, 1.0, 0.1, link),
        "bit_vector": bit_vector(64, 300, link),
        "control_tree": control_tree(64, 4, 1.0),
    }
    told = {name: Negotiator(name, **costs).words() for name in NEGOTIATIONS}
    assert told.pop("none") == ""
    assert all(words.startswith(f"{name}, before") for name, words in told.items())


def test_a_hop_is_as_long_as_the_machine_is_full() -> None:
    machine = CLUSTERS["summit"]
    assert machine.hop(6).latency == machine.intra_latency
    assert machine.hop(7) == Link(5e-6, 1 / 23e9, machine.reduce)


def test_the_coordinator_grows_linearly_and_the_bit_vector_does_not() -> None:
    link = Link(2e-6, 1e-10)
    slow = [coordinator(p, 100, 1e-6, 1e-7, link) for p in (1000, 10_000)]
    fast = [bit_vector(p, 100, link) for p in (1000, 10_000)]
    assert slow[1] > 9 * slow[0]
    assert fast[1] < 1.5 * fast[0]


@pytest.mark.parametrize(
    ("ranks", "expected"), [(1, 0.0), (2, 1 / sqrt(pi)), (3, 1.5 / sqrt(pi)), (10, 1.538752731)]
)
def test_slowest_of_few_ranks_is_exact(ranks: int, expected: float) -> None:
    assert expected_maximum(ranks) == pytest.approx(expected, abs=1e-8)
    assert delay(ranks, 0.1) == pytest.approx(0.1 * expected, abs=1e-8)


def test_clusters_name_what_they_assume() -> None:
    assert list(CLUSTERS) == ["summit", "abci", "dgx-h100", "10gbe", "25gbe", "100gbe"]
    fields = set(Cluster.__dataclass_fields__)
    for one in CLUSTERS.values():
        assert one.assumed
        assert set(one.assumed) <= fields


def test_one_rank_pays_nothing() -> None:
    for name in (*ALGORITHMS, "auto"):
        curve = CLUSTERS["summit"].all_reduce(1, name)
        assert curve(0) == curve(1e12) == 0


def test_more_gpus_than_the_machine_has_are_noted() -> None:
    summit = cluster("summit")
    assert "beyond" not in summit.all_reduce(summit.gpus).source
    assert "beyond its 27,648 GPUs" in summit.all_reduce(summit.gpus + 1).source


def test_bad_input() -> None:
    with pytest.raises(ArgumentError, match="did you mean summit"):
        cluster("sumit")
    with pytest.raises(ArgumentError, match="dgx-h100"):
        cluster("h100")
    with pytest.raises(ArgumentError, match="no all-reduce"):
        CLUSTERS["summit"].all_reduce(8, "butterfly")
    with pytest.raises(ArgumentError, match="no all-reduce"):
        CLUSTERS["10gbe"].all_reduce(8, "nccl")
    with pytest.raises(ArgumentError, match="at least one rank"):
        CLUSTERS["summit"].all_reduce(0)
    with pytest.raises(ArgumentError, match="without bandwidth"):
        Cluster("none", 1, 1, 0.0, 0.0, 0.0, 1.0)
    with pytest.raises(ArgumentError, match="no GPU"):
        Cluster("none", 0, 1, 0.0, 1.0, 0.0, 1.0)
    with pytest.raises(ArgumentError, match="less than nothing"):
        Link(-1.0, 0.0)
    with pytest.raises(ArgumentError, match="does not exist"):
        algorithms.ring(1.0, 0, LINK)
    with pytest.raises(ArgumentError, match="generation"):
        Tuner(1, 1, 1.0, 1.0, "kepler")
    with pytest.raises(ArgumentError, match="no such machine"):
        Tuner(0, 1, 1.0, 1.0)
    with pytest.raises(ArgumentError, match="slowest"):
        expected_maximum(0)
    with pytest.raises(ArgumentError, match="below zero"):
        delay(2, -1.0)
    with pytest.raises(ArgumentError, match="chain"):
        control_tree(8, 1, 1.0)
    with pytest.raises(ArgumentError, match="no negotiation 'vote'"):
        Negotiator("vote")
    with pytest.raises(ArgumentError, match="negotiation"):
        coordinator(0, 1, 1.0, 1.0, LINK)


def test_torch_is_not_loaded() -> None:
    modules = "clusters, negotiation, straggler"
    code = f"import sys\nfrom graphopt.network import {modules}\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
