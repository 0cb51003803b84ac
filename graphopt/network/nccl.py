"""NCCL's own estimate of an all-reduce, by which it chooses algorithm and protocol.

``seconds = latency + bytes / bandwidth`` for ring and tree, each with the protocols LL, LL128 and
Simple. The constants are those of NCCL's tuner as PyTorch ships them. Left out are the limits per
channel, because how many channels NCCL opens is not known from outside, and the corrections PyTorch
adds for one particular RoCE cluster.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from graphopt.errors import ArgumentError


class Algorithm(Enum):
    """The order in which ranks pass data on."""

    TREE = 0
    RING = 1


class Protocol(Enum):
    """How data and flags share the wire: 8-byte stores, 128-byte stores, or large pieces."""

    LL = 0
    LL128 = 1
    SIMPLE = 2


# Microseconds; rows are tree and ring, columns LL, LL128 and Simple.
BASE = ((6.8, 14.0, 8.4), (6.6, 14.0, 8.4))
NVLINK = ((0.6, 1.25, 4.0), (0.6, 1.9, 3.4))
PCI = ((1.0, 1.9, 4.0), (1.0, 2.5, 5.7))
NETWORK = ((5.0, 8.5, 14.0), (2.7, 4.0, 14.0))
# A hop inside a node takes at least this long when the message also crosses the network.
FLOOR = (1.0, 1.0, 3.0)

# GB/s that LL cannot exceed, in one node, two and more.
LL_LIMIT = {
    "volta": (39.0, 39.0, 20.4),
    "ampere": (87.7, 22.5, 19.0),
    "hopper": (141.0, 45.0, 35.0),
    "blackwell": (282.0, 90.0, 70.0),
}

# Share of the tree's bandwidth that a message of 64 * 2**index bytes reaches.
# fmt: off
CORRECTION = (
    (1, 1, 1, 1, 0.9, 0.8, 0.7, 0.7, 0.7, 0.7, 0.6, 0.5,
     0.4, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 1, 1, 1, 1),
    (1, 1, 1, 1, 1, 0.9, 0.8, 0.8, 0.8, 0.7, 0.6, 0.6,
     0.6, 0.6, 0.6, 0.6, 0.8, 0.9, 0.9, 0.9, 0.9, 1, 1, 1),
    (0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.9, 0.8, 0.7, 0.6, 0.6, 0.5,
     0.5, 0.5, 0.5, 0.6, 0.7, 0.8, 0.7, 0.7, 0.8, 0.9, 0.9, 0.9),
)
# fmt: on


@dataclass(frozen=True)
class Tuner:
    """One machine as NCCL's tuner sees it.

    Attributes:
        local: GPUs in each node.
        nodes: number of nodes.
        inside: bus bandwidth in a node, bytes per second.
        between: bus bandwidth of a node's network, bytes per second.
        generation: ``"volta"``, ``"ampere"``, ``"hopper"`` or ``"blackwell"``.
        nvlink: whether GPUs of a node talk over NVLink, not PCIe.
    """

    local: int
    nodes: int
    inside: float
    between: float
    generation: str = "volta"
    nvlink: bool = True

    def __post_init__(self) -> None:
        if min(self.local, self.nodes) < 1 or min(self.inside, self.between) <= 0:
            raise ArgumentError(
                f"NCCL has no such machine: {self}",
                where="Tuner",
                hint="use at least one GPU and node and bandwidths above zero",
            )
        if self.generation not in LL_LIMIT:
            raise ArgumentError(
                f"the GPU generation {self.generation!r} is unknown",
                where="generation",
                hint=f"use one of {', '.join(LL_LIMIT)}",
            )

    @property
    def ranks(self) -> int:
        """GPUs in all nodes together."""
        return self.local * self.nodes

    def latency(self, algorithm: Algorithm, protocol: Protocol, floor: bool = True) -> float:
        """Seconds of an empty message.

        Args:
            algorithm: ring or tree.
            protocol: LL, LL128 or Simple.
            floor: whether hops inside a node are slowed down by the network, as NCCL assumes.
        """
        row, column = algorithm.value, protocol.value
        inside = (NVLINK if self.nvlink else PCI)[row][column]
        if floor and self.nodes > 1:
            inside = max(inside, FLOOR[column])
        between = NETWORK[row][column]
        if algorithm is Algorithm.RING:
            crossing = 2 * (self.nodes - 1)
            hops = (2 * (self.ranks - 1) - crossing) * inside + crossing * between
        else:
            depth = self.nodes.bit_length() - 1
            hops = 2 * ((self.local - 1) * inside + depth * between)
        return 1e-6 * (BASE[row][column] + hops)

    def bandwidth(self, algorithm: Algorithm, protocol: Protocol) -> float:
        """Bytes per second of a large message; zero where NCCL does not use the protocol."""
        if protocol is Protocol.LL128 and self.nodes > 1:
            return 0.0
        bus = self.inside if self.nodes == 1 else min(self.inside, self.between)
        row = self.generation if self.nodes == 1 else "volta"
        limit = 1e9 * LL_LIMIT[row][min(self.nodes, 3) - 1]
        ring = algorithm is Algorithm.RING
        if protocol is Protocol.LL:
            bus = min(limit, bus * 0.5 if ring else bus / 3.8)
        elif protocol is Protocol.LL128:
            bus *= 120 / 128 if ring else 7 / 9
        elif not ring:
            bus *= 0.92
        return bus * self.ranks / (2 * (self.ranks - 1)) if ring else 0.5 * bus

    def seconds(self, size: float, algorithm: Algorithm, protocol: Protocol) -> float:
        """Seconds of an all-reduce; infinite where NCCL does not use the protocol."""
        if self.ranks == 1:
            return 0.0
        bandwidth = self.bandwidth(algorithm, protocol)
        if not bandwidth:
            return float("inf")
        index = (int(size) >> 6).bit_length() - 1
        if algorithm is Algorithm.TREE and index < len(CORRECTION[0]):
            bandwidth *= CORRECTION[protocol.value][max(0, index)]
        return self.latency(algorithm, protocol) + size / bandwidth

    def best(
        self, size: float, among: Iterable[Algorithm] = Algorithm
    ) -> tuple[float, Algorithm, Protocol]:
        """The cheapest choice for a message of `size` bytes: seconds, algorithm and protocol."""
        choices = [(self.seconds(size, a, p), a, p) for a in among for p in Protocol]
        return min(choices, key=lambda choice: choice[0])
