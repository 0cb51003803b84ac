"""Reorder the backward half so that more of the communication hides behind it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from graphopt.analysis.gradient_order import GradientOrder, gradient_order, measured_order
from graphopt.analysis.profile import measure
from graphopt.graph import Graph
from graphopt.network.named import link_curve
from graphopt.passbase import EXACT, Applied, Declined, Number, Numerics, Outcome, Pass, PassContext
from graphopt.passes.schedule.rewrite import arrange, outline
from graphopt.passes.schedule.search import Search
from graphopt.passes.schedule.trial import confirmed


@dataclass(frozen=True)
class Schedule(Pass):
    """Compute large gradients early and leave little to send for the end of backward.

    Operators that lead to one gradient only (the product with the saved activation) may run at any
    time after their operands are there, until the end; everything else keeps its order. The order
    is taken whose gradients, grouped anew, are predicted to be reduced first; the present one stays
    if none gains. Backward convolutions are split in two where the order asks for it. A second
    application finds nothing, unless `memory` ruled out an order that it allows the second time.

    In a running job rank 0 decides for all by measured times, and takes only an order that still
    gains when it is measured itself.

    Attributes:
        link: whose costs to plan with, as for ``group_gradients``.
        memory: how much the peak of memory may grow, as a share of it, since operands of what is
            put off live longer.
    """

    name: ClassVar[str] = "schedule"
    numerics: ClassVar[Numerics] = EXACT
    levels: ClassVar[frozenset[str]] = frozenset({"joint"})
    provides: ClassVar[frozenset[str]] = frozenset({"scheduled"})
    conflicts: ClassVar[frozenset[str]] = frozenset({"grouped"})
    idempotent: ClassVar[bool] = False
    source: ClassVar[str] = "Oh et al., EuroSys 2022; Johnson 1954 and Sidney 1979 for the order"

    link: str = "measure"
    memory: float = 0.25

    def __post_init__(self) -> None:
        if not self.memory >= 0:
            raise ValueError(f"memory is {self.memory}, not a share of zero or more")

    def apply(self, graph: Graph, ctx: PassContext) -> Outcome:
        """Reorder `graph`, or decline with the predicted times."""
        world = ctx.workers.size if ctx.workers else ctx.mesh.get("dp", 1)
        if world == 1:
            return _declined("one-rank", "there is one rank, so nothing has to be reduced")
        if not graph.get(gradient_order).ready:
            return _declined("no-gradients", "no parameter receives a gradient")
        choice = self._choice(graph, ctx, world)
        if not choice["order"]:
            return _declined(choice["reason"], choice["detail"], choice["numbers"])
        if choice["graph"] != outline(graph):
            return _declined("other-graph", "rank 0 chose the order for other operators")
        arrange(graph, choice["split"], choice["order"])
        return Outcome((Applied("backward", choice["detail"], choice["numbers"]),))

    def _choice(self, graph: Graph, ctx: PassContext, world: int) -> dict[str, Any]:
        """The best order of this graph, or of rank 0's.

        Messages travel in one order on all ranks. A rank that computed in an order of its own would
        hold up those that the others have ready, behind one that it has not.
        """
        curve = link_curve(self.link, ctx)

        def search(order: GradientOrder) -> Search:
            return Search(graph, order, curve, world, self.memory)

        def decide() -> str:
            mine = search(measured_order(graph, measure(graph)))
            return json.dumps({**confirmed(mine, mine.best()), "graph": outline(graph)})

        order = graph.get(gradient_order)
        if ctx.workers is None:
            return {**search(order).best(), "graph": outline(graph)}
        known = "\n".join([f"passes {self}", *order.sizes])
        choice: dict[str, Any] = json.loads(ctx.workers.agree("gradients", known, decide))
        return choice


def _declined(reason: str, detail: str, numbers: Mapping[str, Number] | None = None) -> Outcome:
    return Outcome(declined=(Declined("backward", reason, detail, numbers or {}),))
