"""Reduce gradients over all ranks, in groups that travel while the backward still computes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

from graphopt.analysis.gradient_order import GradientOrder, gradient_order, measured_order
from graphopt.analysis.linearity import linear_in_tangents
from graphopt.analysis.profile import profile_graph
from graphopt.errors import ArgumentError
from graphopt.graph import Graph
from graphopt.grouping.planner import plan
from graphopt.network.curve import Curve
from graphopt.network.named import link_curve
from graphopt.passbase import (
    REASSOCIATED,
    Applied,
    Declined,
    Numerics,
    Outcome,
    Pass,
    PassContext,
    lowered,
)
from graphopt.passes.group_gradients.rewrite import insert_collectives
from graphopt.plan.group_gradients import Reduction
from graphopt.plan.grouping import Grouping
from graphopt.plan.part import from_data, to_data


@dataclass(frozen=True)
class GroupGradients(Pass):
    """Average every parameter's gradient over all ranks, as few messages as hide best.

    The groups are those that finish earliest for the measured cost of messages on this job's link
    and the measured times at which this model's gradients are ready. The collectives are nodes of
    the backward graph, started where the last gradient of their group is ready.

    Attributes:
        link: ``measure`` times the job's own link when it starts; a name of
            `graphopt.network.clusters` takes that machine's cost.
        wire: ``native`` sends gradients as they are; ``bf16`` rounds them for the way; ``int32``
            sends integers of a common exponent, whose sum is the same, bit for bit, for every
            number of ranks and every grouping.
        stale: ``none`` waits for this step's gradients. ``double_buffer`` and ``lag`` return those
            of the step before, so that a whole step hides the communication; this changes the
            training method.
    """

    name: ClassVar[str] = "group_gradients"
    levels: ClassVar[frozenset[str]] = frozenset({"joint"})
    provides: ClassVar[frozenset[str]] = frozenset({"grouped"})
    conflicts: ClassVar[frozenset[str]] = frozenset({"grouped"})
    changes_signature: ClassVar[bool] = True
    communicates: ClassVar[frozenset[str]] = frozenset({"dp"})
    reduces: ClassVar[bool] = True
    idempotent: ClassVar[bool] = False
    symbolic: ClassVar[bool] = True
    source: ClassVar[str] = "Laanait et al., arXiv 1909.11150; optimal grouping is graphopt's own"

    link: str = "measure"
    wire: Literal["native", "bf16", "int32"] = "native"
    stale: Literal["none", "double_buffer", "lag"] = "none"

    def __post_init__(self) -> None:
        if self.wire == "int32" and self.stale != "none":
            raise ArgumentError(
                f"wire=int32 and stale={self.stale} cannot be combined",
                hint="leave one of them out",
            )

    @property
    def on_one_rank(self) -> bool:  # type: ignore[override]
        """The integer wire gives one rank the bits that many ranks would have."""
        return self.wire == "int32"

    @property
    def numerics(self) -> Numerics:  # type: ignore[override]
        """Sums over ranks are rounded in another order; a narrow wire rounds more."""
        return {"native": REASSOCIATED, "bf16": lowered(2**-7), "int32": lowered(2**-20)}[self.wire]

    def apply(self, graph: Graph, ctx: PassContext) -> Outcome:
        """Insert one collective per group and leave the rank's own gradients as ``LOCAL``."""
        world, ranks = ctx.size("dp"), ctx.ranks.get("dp")
        if world == 1 and not (self.on_one_rank and ranks):
            return _declined("one-rank", "there is one rank, so nothing has to be reduced")
        order = graph.get(gradient_order)
        if not order.ready:
            return _declined("no-gradients", "no parameter receives a gradient")
        _refuse_sparse(order)
        grouping = self._agreed(graph, ctx, order, world)
        if "staged" in graph.facts:
            self._check_staged()
            return Outcome(_applied(grouping), part=Reduction(grouping, at_end=True))
        scaled = self.wire == "native" and graph.get(linear_in_tangents)
        insert_collectives(
            graph,
            [g.names for g in grouping.groups],
            wire=self.wire,
            world=world,
            channel=ranks.channel if ranks else "dp",
            scaled=scaled,
        )
        part = Reduction(grouping, self.wire, self.stale, 1 / world if scaled else 1.0)
        return Outcome(_applied(grouping), part=part)

    def _check_staged(self) -> None:
        """Stages have backwards of their own, whose messages are not in this graph."""
        for option, value, plain in (("wire", self.wire, "native"), ("stale", self.stale, "none")):
            if value != plain:
                raise ArgumentError(
                    f"{option}={value} is not there for steps in stages",
                    hint=f"leave {option} out, or the pass that cuts the step into stages",
                )

    def _agreed(self, graph: Graph, ctx: PassContext, order: GradientOrder, world: int) -> Grouping:
        """Rank 0's plan; times differ from rank to rank, and groups must not."""
        curve = self._curve(ctx)

        def decide(by: GradientOrder) -> Grouping:
            return plan(
                by.ready, curve, by.backward, link=curve.source, times=by.times, world=world
            )

        ranks = ctx.ranks.get("dp")
        if ranks is None:
            return decide(order)
        known = "\n".join([f"passes {self}", *order.sizes])
        text = ranks.agree(
            "gradients",
            known,
            lambda: json.dumps(to_data(decide(measured_order(graph, profile_graph(graph))))),
        )
        # Along other dimensions ranks have other rank 0s, and measured other times.
        for dimension, others in ctx.ranks.items():
            if dimension != "dp":
                text = others.agree("gradients", known, partial(str, text))
        return from_data(Grouping, json.loads(text))

    def _curve(self, ctx: PassContext) -> Curve:
        return link_curve(self.link, ctx.size("dp"), ctx.ranks.get("dp"))


def _refuse_sparse(order: GradientOrder) -> None:
    """Ranks would have to agree on indices first, which no message of fixed size can carry."""
    if order.sparse:
        raise ArgumentError(
            f"the gradient of {order.sparse[0]!r} is sparse, and sparse gradients are not reduced",
            hint="build the embedding with sparse=False, or optimize with passes='cleanup' and "
            "wrap the model in DistributedDataParallel",
        )


def _declined(reason: str, detail: str) -> Outcome:
    return Outcome(declined=(Declined("gradients", reason, detail),))


def _applied(grouping: Grouping) -> tuple[Applied, ...]:
    others = {c.name: round(1e3 * (c.finish - grouping.backward), 3) for c in grouping.candidates}
    summary = Applied(
        "gradients",
        f"reduced in {len(grouping.groups)} groups over {grouping.world} ranks",
        {
            "exposed_ms": round(1e3 * grouping.exposed, 3),
            "bound_ms": round(1e3 * max(0.0, grouping.bound - grouping.backward), 3),
            **{f"{name} exposed_ms": ms for name, ms in others.items()},
        },
    )
    groups = (
        Applied(
            f"{g.names[0]} … {g.names[-1]}" if len(g.names) > 1 else g.names[0],
            "reduced in one message",
            {"gradients": len(g.names), "bytes": g.bytes, "ready_ms": round(1e3 * g.ready, 3)},
        )
        for g in grouping.groups
    )
    return summary, *groups
