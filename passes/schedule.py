"""Reorder the backward half so that more of the communication hides behind it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from graphopt.analysis.gradient_order import gradient_order, measured_order
from graphopt.analysis.profile import measure
from graphopt.graph import Graph
from graphopt.passbase import EXACT, Applied, Declined, Number, Numerics, Outcome, Pass, PassContext
from graphopt.passes.schedule_link import link_curve
from graphopt.passes.schedule_rewrite import reorder, split, splittable, tail
from graphopt.passes.schedule_search import Search


@dataclass(frozen=True)
class Schedule(Pass):
    """Compute large gradients early and leave little to send for the end of backward.

    Operators that lead to one gradient only (the product with the saved activation) may run at any
    time after their operands are there, until the end; everything else keeps its order. The order
    is taken whose gradients, grouped anew, are predicted to be reduced first; the present one stays
    if none gains. Backward convolutions are split in two where the order asks for it. A second
    application finds nothing, unless `memory` ruled out an order that it allows the second time.

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
        whole = {node.name: node for node in splittable(graph)}
        split(graph, [whole[name] for name in choice["split"]])
        named = {node.name: node for node in tail(graph)}
        reorder(graph, [named[name] for name in choice["order"]])
        return Outcome((Applied("backward", choice["detail"], choice["numbers"]),))

    def _choice(self, graph: Graph, ctx: PassContext, world: int) -> dict[str, Any]:
        """The best order for this rank; `group_gradients` agrees on that of the messages."""
        curve = link_curve(self.link, ctx)
        order = measured_order(graph, measure(graph)) if ctx.workers else graph.get(gradient_order)
        return Search(graph, order, curve, world, self.memory).best()


def _declined(reason: str, detail: str, numbers: Mapping[str, Number] | None = None) -> Outcome:
    return Outcome(declined=(Declined("backward", reason, detail, numbers or {}),))
