"""What it costs ranks without a common plan to agree on what to reduce next, per cycle.

Models of a run-time negotiation as Horovod does it: a coordinator that hears every rank, the
bit-vector of cached tensors, and a tree of coordinators. A compiled plan needs none of them; they
model what it is compared with.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, log

from graphopt.errors import ArgumentError
from graphopt.network.algorithms import Link, binomial_tree

STATUS_BITS = 3
"""Flags before the tensors: shut-down, something uncached, something invalid."""
WORD = 64
NEGOTIATIONS = ("none", "coordinator", "bit_vector", "control_tree")


@dataclass(frozen=True)
class Negotiator:
    """One of `NEGOTIATIONS`, with everything but the machine that its cost depends on.

    The defaults are assumptions: no source available to us measures them.

    Attributes:
        name: one of `NEGOTIATIONS`.
        message: seconds a rank spends on another rank's message.
        tensor: seconds rank 0 spends on one tensor that one rank reports.
        radix: children of each rank of a control tree.

    Raises:
        ArgumentError: the name is not one of `NEGOTIATIONS`.
    """

    name: str = "none"
    message: float = 1e-6
    tensor: float = 1e-6
    radix: int = 8

    def __post_init__(self) -> None:
        if self.name not in NEGOTIATIONS:
            raise ArgumentError(
                f"there is no negotiation {self.name!r}",
                where="negotiation",
                hint=f"use one of {', '.join(NEGOTIATIONS)}",
            )

    def seconds(self, ranks: int, ready: int, cached: int, link: Link) -> float:
        """Seconds of one cycle.

        Args:
            ranks: number of ranks.
            ready: tensors that are ready in this cycle.
            cached: all tensors that are known, ready or not.
            link: one hop between ranks.
        """
        if self.name == "coordinator":
            return coordinator(ranks, ready, self.message, self.tensor, link)
        if self.name == "bit_vector":
            return bit_vector(ranks, cached, link)
        if self.name == "control_tree":
            return control_tree(ranks, self.radix, self.message)
        return 0.0

    def words(self) -> str:
        """For a reader, with the assumed costs that it depends on; empty where there is none."""
        costs = {
            "coordinator": f"rank 0 spends {1e6 * self.message:g} us on each rank and "
            f"{1e6 * self.tensor:g} us on each tensor of it (assumed)",
            "bit_vector": "one bitwise all-reduce of a flag per gradient",
            "control_tree": f"a rank spends {1e6 * self.message:g} us on each of up to "
            f"{self.radix} others (assumed)",
        }
        return f"{self.name}, before each group: {costs[self.name]}" if self.name in costs else ""


def coordinator(ranks: int, ready: int, message: float, tensor: float, link: Link) -> float:
    """Seconds of one cycle in which rank 0 hears every rank and broadcasts what is ready.

    Args:
        ranks: number of ranks.
        ready: tensors that each rank reports in this cycle.
        message: seconds rank 0 spends on one rank's message.
        tensor: seconds rank 0 spends on one reported tensor.
        link: one hop of the broadcast.

    Raises:
        ArgumentError: for less than one rank or a negative count or cost.
    """
    _check(ranks, ready, message, tensor)
    # An empty broadcast is the second half of an empty all-reduce.
    broadcast = binomial_tree(0.0, ranks, link) / 2
    return (ranks - 1) * (message + ready * tensor) + broadcast


def bit_vector_bytes(tensors: int) -> int:
    """Bytes that one rank contributes, in whole words: the flags, and a bit per cached tensor."""
    return 8 * -(-(tensors + STATUS_BITS) // WORD)


def bit_vector(ranks: int, tensors: int, link: Link) -> float:
    """Seconds of one cycle in which all tensors are cached: one bitwise all-reduce.

    Args:
        ranks: number of ranks.
        tensors: cached tensors.
        link: one hop between hosts.

    Raises:
        ArgumentError: for less than one rank or a negative number of tensors.
    """
    _check(ranks, tensors)
    # So few bytes are reduced and sent back along a tree, which takes two latencies per level.
    return binomial_tree(bit_vector_bytes(tensors), ranks, link)


def control_tree(ranks: int, radix: int, message: float) -> float:
    """Seconds until readiness has climbed a tree in which no rank hears more than `radix` others.

    Args:
        ranks: number of ranks.
        radix: children of each rank.
        message: seconds a rank spends on one message.

    Raises:
        ArgumentError: for less than one rank, a radix below two or a negative cost.
    """
    _check(ranks, 0, message)
    if radix < 2:
        raise ArgumentError(
            f"a control tree of radix {radix} is a chain",
            where="radix",
            hint="use a radix of 2 or more",
        )
    levels = ceil(log(ranks) / log(radix) - 1e-9) if ranks > 1 else 0
    return radix * levels * message


def _check(ranks: int, *others: float) -> None:
    if ranks < 1 or any(value < 0 for value in others):
        raise ArgumentError(
            f"a negotiation of {ranks} ranks with {others} does not exist",
            where="ranks",
            hint="use at least one rank, and counts and costs of zero or more",
        )
