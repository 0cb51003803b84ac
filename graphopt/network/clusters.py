"""Named machines and what an all-reduce costs on them."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt

from graphopt.errors import ArgumentError
from graphopt.network import algorithms
from graphopt.network.algorithms import Link
from graphopt.network.curve import Curve
from graphopt.network.nccl import Algorithm, Tuner

# NCCL's correction for its tree changes at powers of two. Sampled only there, the curve never
# decreases, whereas NCCL's own estimate drops wherever the correction improves.
SIZES = tuple(float(1 << power) for power in range(31))
ALGORITHMS = (
    "ring",
    "recursive_doubling",
    "halving_doubling",
    "binomial_tree",
    "double_binary_tree",
    "hierarchical",
    "torus",
    "nccl_ring",
    "nccl_tree",
    "nccl",
)


@dataclass(frozen=True)
class Cluster:
    """Nodes of equal GPUs behind equal links.

    Attributes:
        name: short name, as in `CLUSTERS`.
        gpus_per_node: ranks in each node.
        nodes: nodes of the whole machine.
        intra_latency: seconds per message in a node.
        intra_bandwidth: bytes per second and direction between GPUs of a node.
        inter_latency: seconds per message between nodes.
        inter_bandwidth: bytes per second and direction in and out of one *node*.
        reduce: seconds per byte of adding what arrived.
        generation: GPU generation for NCCL's tuner; empty where NCCL is not used.
        nvlink: whether GPUs of a node talk over NVLink.
        usual: the algorithms between which ``"auto"`` takes the cheapest for each size.
        assumed: the inputs above that are assumptions and neither published nor measured.
    """

    name: str
    gpus_per_node: int
    nodes: int
    intra_latency: float
    intra_bandwidth: float
    inter_latency: float
    inter_bandwidth: float
    reduce: float = 0.0
    generation: str = ""
    nvlink: bool = False
    usual: tuple[str, ...] = ("ring", "halving_doubling")
    assumed: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if min(self.gpus_per_node, self.nodes) < 1:
            raise ArgumentError(
                f"cluster {self.name!r} has no GPU",
                where="gpus_per_node, nodes",
                hint="use at least one node with one GPU",
            )
        if min(self.intra_bandwidth, self.inter_bandwidth) <= 0:
            raise ArgumentError(
                f"cluster {self.name!r} has a link without bandwidth",
                where="intra_bandwidth, inter_bandwidth",
                hint="give bytes per second above zero",
            )

    @property
    def gpus(self) -> int:
        """GPUs of the whole machine."""
        return self.gpus_per_node * self.nodes

    def all_reduce(self, world: int, algorithm: str = "auto") -> Curve:
        """Seconds of one all-reduce over `world` GPUs, as a curve over 1 B to 1 GiB.

        Nodes are filled one after the other; a partly filled last one counts as full. More
        GPUs than the machine has are allowed and noted in the `source` of the curve.

        Args:
            world: number of ranks; one rank pays nothing.
            algorithm: one of `ALGORITHMS`, or ``"auto"`` for the cheapest of `usual`.

        Raises:
            ArgumentError: for less than one rank or an algorithm that this cluster does not have.
        """
        if world < 1:
            raise ArgumentError(
                f"{world} ranks cannot reduce anything",
                where="world",
                hint="use at least one rank",
            )
        names = self.usual if algorithm == "auto" else (algorithm,)
        costs = [self._cost(world, name) for name in names]
        note = f", beyond its {self.gpus:,} GPUs" if world > self.gpus else ""
        source = f"{self.name}: {algorithm} over {world:,} GPUs{note}"
        if world == 1:
            return Curve(((0.0, 0.0),), source)
        return Curve(tuple((n, min(cost(n) for cost in costs)) for n in SIZES), source)

    def hop(self, world: int) -> Link:
        """One message between the farthest of `world` ranks."""
        if world > self.gpus_per_node:
            return Link(self.inter_latency, 1 / self.inter_bandwidth, self.reduce)
        return Link(self.intra_latency, 1 / self.intra_bandwidth, self.reduce)

    def _cost(self, world: int, name: str) -> Callable[[float], float]:
        local = min(world, self.gpus_per_node)
        nodes = -(-world // self.gpus_per_node)
        if name in ("nccl", "nccl_ring", "nccl_tree") and self.generation:
            return self._nccl(local, nodes, name)
        inside, between = self.hop(local), self.hop(world)
        around = shared = inside
        if nodes > 1:
            # A ring enters and leaves each node once; its hops are a mixture of both kinds.
            latency = between.latency * nodes / world + inside.latency * (1 - nodes / world)
            around = Link(latency, max(inside.per_byte, between.per_byte), self.reduce)
            # Distant partners are on other nodes, for all GPUs of a node at the same time.
            per_byte = max(inside.per_byte, local * between.per_byte)
            shared = Link(between.latency, per_byte, self.reduce)
        x, y = _rectangle(local, nodes)
        forms: dict[str, Callable[[float], float]] = {
            "ring": lambda n: algorithms.ring(n, world, around),
            "recursive_doubling": lambda n: algorithms.recursive_doubling(n, world, shared),
            "halving_doubling": lambda n: algorithms.halving_doubling(n, world, shared),
            "binomial_tree": lambda n: algorithms.binomial_tree(n, world, between),
            "double_binary_tree": lambda n: algorithms.double_binary_tree(n, world, between),
            "hierarchical": lambda n: algorithms.hierarchical(n, local, nodes, inside, between),
            "torus": lambda n: algorithms.torus(n, x, y, around, shared),
        }
        if name not in forms:
            raise ArgumentError(
                f"{name!r} is no all-reduce of cluster {self.name!r}",
                where="algorithm",
                hint=f"use auto or one of {', '.join(ALGORITHMS if self.generation else forms)}",
            )
        return forms[name]

    def _nccl(self, local: int, nodes: int, name: str) -> Callable[[float], float]:
        tuner = Tuner(
            local, nodes, self.intra_bandwidth, self.inter_bandwidth, self.generation, self.nvlink
        )
        if name == "nccl":
            return lambda size: tuner.best(size)[0]
        kind = Algorithm.RING if name == "nccl_ring" else Algorithm.TREE
        return lambda size: tuner.best(size, (kind,))[0]


def _rectangle(local: int, nodes: int) -> tuple[int, int]:
    """The most square torus whose rows are whole nodes, or that divides the only node."""
    if nodes == 1:
        x = max(d for d in range(1, local + 1) if local % d == 0 and d * d <= local)
        return local // x, x
    divisors = [d for d in range(1, nodes + 1) if nodes % d == 0]
    rows = min(divisors, key=lambda d: abs(local * d - sqrt(local * nodes)))
    return local * rows, nodes // rows


GB = 1e9
_NCCL = ("nccl",)
_LATENCIES = ("intra_latency", "inter_latency", "reduce")
_LINKS = (*_LATENCIES, "intra_bandwidth", "inter_bandwidth")
# fmt: off
_ALL = (
    Cluster("summit", 6, 4608, 2e-6, 50 * GB, 5e-6, 23 * GB, 2e-12, "volta", True, _NCCL, _LINKS),
    Cluster("abci", 4, 1088, 2e-6, 50 * GB, 5e-6, 23 * GB, 2e-12, "volta", True, _NCCL,
            ("gpus_per_node", "nodes", *_LINKS)),
    Cluster("dgx-h100", 8, 32, 2e-6, 370 * GB, 5e-6, 8 * 46 * GB, 5e-13, "hopper", True, _NCCL,
            ("nodes", *_LATENCIES)),
    Cluster("10gbe", 1, 64, 5e-6, 10 * GB, 3e-5, 9.43 * GB / 8, 1e-10, assumed=(
            "gpus_per_node", "nodes", "intra_bandwidth", *_LATENCIES)),
    # Ethernet is assumed at 92 % of its line rate, close to what was measured at 10 Gbit/s.
    Cluster("25gbe", 4, 128, 5e-6, 10 * GB, 2e-5, 0.92 * 25 * GB / 8, 2e-12, assumed=(
            "gpus_per_node", "nodes", *_LINKS)),
    Cluster("100gbe", 8, 128, 5e-6, 10 * GB, 1e-5, 0.92 * 100 * GB / 8, 2e-12, assumed=(
            "gpus_per_node", "nodes", *_LINKS)),
)
# fmt: on
CLUSTERS = {one.name: one for one in _ALL}


def cluster(name: str) -> Cluster:
    """The machine of that name.

    Raises:
        ArgumentError: for a name that is not in `CLUSTERS`; it lists the nearest ones.
    """
    if name in CLUSTERS:
        return CLUSTERS[name]
    close = difflib.get_close_matches(name.lower(), CLUSTERS, n=3, cutoff=0.4)
    raise ArgumentError(
        f"there is no cluster {name!r}",
        where="cluster",
        hint=(f"did you mean {' or '.join(close)}? " if close else "")
        + f"known are {', '.join(CLUSTERS)}",
    )
