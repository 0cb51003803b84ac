"""The cost of a message by the name of its link."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

from graphopt.network.clusters import cluster
from graphopt.network.curve import Curve

# The network that is assumed where nothing was measured: common, and slow enough to matter.
ASSUMED = "10gbe"


class MeasuresLink(Protocol):
    """Running ranks that can measure the link between them."""

    def link(self) -> Curve:
        """Measured seconds of an all-reduce over its bytes."""


def link_curve(link: str, world: int, ranks: MeasuresLink | None) -> Curve:
    """Seconds of one all-reduce over its bytes.

    Args:
        link: ``"measure"``, or a name of `graphopt.network.clusters`. Without running ranks,
            ``"measure"`` means the profile `ASSUMED`, and `Curve.source` says so.
        world: number of ranks.
        ranks: those of a running job.

    Raises:
        ArgumentError: there is no such cluster.
    """
    if link != "measure":
        return cluster(link).all_reduce(world)
    if ranks is not None:
        return ranks.link()
    curve = cluster(ASSUMED).all_reduce(world)
    return replace(curve, source=f"{curve.source} (assumed: no link to measure)")
