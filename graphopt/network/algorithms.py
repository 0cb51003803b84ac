"""Closed forms of all-reduce algorithms: seconds from bytes, ranks and the cost of a link.

The formulas are the usual latency-bandwidth ones. Every function takes the bytes each rank
contributes and returns seconds; a single rank pays nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log2

from graphopt.errors import ArgumentError

PIECE = float(1 << 17)
"""Bytes of one pipeline piece of a double binary tree."""


@dataclass(frozen=True)
class Link:
    """What one message costs: ``latency + bytes * per_byte``, and reducing it on arrival.

    Attributes:
        latency: seconds per message (alpha).
        per_byte: seconds per byte on the wire (beta).
        reduce: seconds per byte of the addition (gamma).

    Raises:
        ArgumentError: for a cost below zero.
    """

    latency: float
    per_byte: float
    reduce: float = 0.0

    def __post_init__(self) -> None:
        if min(self.latency, self.per_byte, self.reduce) < 0:
            raise ArgumentError(
                f"a link cannot cost less than nothing: {self}",
                where="Link",
                hint="give latency in seconds and per_byte, reduce in seconds per byte",
            )


def ring(size: float, ranks: int, link: Link) -> float:
    """Reduce-scatter and all-gather around a ring: optimal in bytes, linear in ranks."""
    _check(size, ranks)
    share = (ranks - 1) / ranks * size
    return 2 * (ranks - 1) * link.latency + 2 * share * link.per_byte + share * link.reduce


def recursive_doubling(size: float, ranks: int, link: Link) -> float:
    """Everybody exchanges everything with a partner at doubling distance: fewest messages."""
    _check(size, ranks)
    steps = ranks.bit_length() - 1
    each = link.latency + size * (link.per_byte + link.reduce)
    return steps * each + _fold(size, ranks, link)


def halving_doubling(size: float, ranks: int, link: Link) -> float:
    """Recursive halving, then doubling: optimal in bytes and logarithmic in ranks."""
    _check(size, ranks)
    steps = ranks.bit_length() - 1
    core = 1 << steps
    share = (core - 1) / core * size
    time = 2 * steps * link.latency + 2 * share * link.per_byte + share * link.reduce
    return time + _fold(size, ranks, link)


def binomial_tree(size: float, ranks: int, link: Link) -> float:
    """Reduce to one rank along a binomial tree and broadcast back, whole messages at a time."""
    _check(size, ranks)
    depth = _depth(ranks)
    return depth * (2 * (link.latency + size * link.per_byte) + size * link.reduce)


def double_binary_tree(size: float, ranks: int, link: Link, piece: float = PIECE) -> float:
    """Two complementary trees, each for half of the bytes, in pipelined pieces.

    The latency of further pieces is hidden behind their bytes. Filling the pipeline costs one piece
    per further level and direction, so a message of one piece costs what a plain tree costs.

    Args:
        size: bytes per rank.
        ranks: number of ranks.
        link: cost of one hop.
        piece: bytes of a pipeline piece.
    """
    _check(size, ranks)
    if ranks == 1:
        return 0.0
    depth = _depth(ranks)
    first = min(size, piece) * (2 * link.per_byte + link.reduce)
    through = size * (2 * link.per_byte + link.reduce)
    return 2 * depth * link.latency + through + (depth - 1) * first


def hierarchical(size: float, local: int, nodes: int, inside: Link, between: Link) -> float:
    """Reduce-scatter in each node, a ring per shard between the nodes, all-gather in each node.

    Args:
        size: bytes per rank.
        local: ranks in each node.
        nodes: number of nodes.
        inside: one hop in a node.
        between: one hop between nodes; its bandwidth is that of the whole node, which all its
            shards share.
    """
    return ring(size, local, inside) + ring(size, nodes, between)


def torus(size: float, x: int, y: int, along_x: Link, along_y: Link) -> float:
    """Rings along the rows of an ``x * y`` torus, then along its columns on the shards of a row.

    Args:
        size: bytes per rank.
        x: ranks in a row.
        y: ranks in a column.
        along_x: one hop in a row.
        along_y: one hop in a column; all columns run at once.
    """
    _check(size, x)
    return ring(size, x, along_x) + ring(size / x, y, along_y)


def _depth(ranks: int) -> int:
    return (ranks - 1).bit_length()


def _fold(size: float, ranks: int, link: Link) -> float:
    """Ranks beyond a power of two hand their data to a partner first and get the sum at the end."""
    if log2(ranks).is_integer():
        return 0.0
    return 2 * (link.latency + size * link.per_byte) + size * link.reduce


def _check(size: float, ranks: int) -> None:
    if ranks < 1 or size < 0:
        raise ArgumentError(
            f"an all-reduce of {size} bytes over {ranks} ranks does not exist",
            where="size, ranks",
            hint="use at least one rank and no negative size",
        )
