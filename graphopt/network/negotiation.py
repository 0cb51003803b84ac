"""What it costs ranks without a common plan to agree on what to reduce next, per cycle.

Models of a run-time negotiation as Horovod does it: a coordinator that hears every rank, the
bit-vector of cached tensors, and a tree of coordinators. A compiled plan needs none of them; they
are here to model what it is compared with.
"""

from __future__ import annotations

from math import ceil, log

from graphopt.errors import ArgumentError
from graphopt.network.algorithms import Link, binomial_tree

STATUS_BITS = 3
"""Flags before the tensors: shut-down, something uncached, something invalid."""
WORD = 64


def coordinator(
    ranks: int, ready: int, message: float, tensor: float, link: Link, reply: float = 0.0
) -> float:
    """Seconds of one cycle in which rank 0 hears every rank and broadcasts what is ready.

    Args:
        ranks: number of ranks.
        ready: tensors that each rank reports in this cycle.
        message: seconds rank 0 spends on one rank's message.
        tensor: seconds rank 0 spends on one reported tensor.
        link: one hop of the broadcast.
        reply: bytes of the answer.

    Raises:
        ArgumentError: for less than one rank or a negative count or cost.
    """
    _check(ranks, ready, message, tensor, reply)
    # A broadcast is the second half of a tree all-reduce that adds nothing.
    broadcast = binomial_tree(reply, ranks, Link(link.latency, link.per_byte)) / 2
    return (ranks - 1) * (message + ready * tensor) + broadcast


def bit_vector_bits(tensors: int) -> int:
    """Bits that one rank contributes: three flags and one for each cached tensor."""
    _check(1, tensors)
    return tensors + STATUS_BITS


def bit_vector_bytes(tensors: int, timeline: bool = False) -> int:
    """Bytes of the bit-vector, in whole 64-bit words.

    Args:
        tensors: cached tensors.
        timeline: whether a complemented copy travels along, for the union beside the intersection.
    """
    words = -(-bit_vector_bits(tensors) // WORD)
    return 8 * words * (2 if timeline else 1)


def bit_vector(ranks: int, tensors: int, link: Link, invalid: bool = False) -> float:
    """Seconds of one cycle in which all tensors are cached: one bitwise all-reduce.

    Args:
        ranks: number of ranks.
        tensors: cached tensors.
        link: one hop between hosts.
        invalid: whether a rank saw a changed tensor, which needs a second all-reduce.

    Raises:
        ArgumentError: for less than one rank or a negative number of tensors.
    """
    _check(ranks, tensors)
    # So few bytes are reduced and sent back along a tree, which takes two latencies per level.
    once = binomial_tree(bit_vector_bytes(tensors), ranks, link)
    return once * (2 if invalid else 1)


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
