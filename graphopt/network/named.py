"""What a message costs while a plan is made."""

from __future__ import annotations

from dataclasses import replace

from graphopt.network.clusters import cluster
from graphopt.network.curve import Curve
from graphopt.passbase import PassContext

# The network that is assumed where nothing was measured: common, and slow enough to matter.
ASSUMED = "10gbe"


def link_curve(link: str, ctx: PassContext) -> Curve:
    """Seconds of one all-reduce over its bytes, for the ranks that `ctx` knows.

    Args:
        link: ``"measure"``, or a name of `graphopt.network.clusters`. Without running ranks,
            ``"measure"`` means the profile `ASSUMED`, and `Curve.source` says so.
        ctx: knows the running ranks, or the sizes of a mesh.

    Raises:
        ArgumentError: there is no such cluster.
    """
    if link == "measure" and ctx.workers is not None:
        return ctx.workers.link()
    world = ctx.workers.size if ctx.workers is not None else ctx.mesh.get("dp", 1)
    if link != "measure":
        return cluster(link).all_reduce(world)
    curve = cluster(ASSUMED).all_reduce(world)
    return replace(curve, source=f"{curve.source} (assumed: no link to measure)")
