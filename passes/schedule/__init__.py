"""Reorder the backward half so that more of the communication hides behind it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from graphopt.analysis.gradient_order import GradientOrder, gradient_order, measured_order
from graphopt.analysis.profile import profile_graph
from graphopt.graph import Graph
from graphopt.network.named import link_curve
from graphopt.passbase import (
    EXACT,
    Applied,
    Declined,
    Number,
    Numerics,
    Outcome,
    Pass,
    PassContext,
    Send,
)
from graphopt.passes.schedule.rewrite import arrange, outline, renamed, tail
from graphopt.passes.schedule.search import OrderSearch
from graphopt.passes.schedule.trial import confirmed, device_of, race, step_of


@dataclass(frozen=True)
class Schedule(Pass):
    """Compute large gradients early and leave little to send for the end of backward.

    Operators that lead to one gradient only (the product with the saved activation) may run at any
    time once their operands are there; everything else keeps its order. The pass picks the order
    whose gradients, regrouped, are predicted to be reduced first, and keeps the present one if none
    is better. Backward convolutions are split in two where the order requires it. A second
    application finds nothing, unless `memory` ruled out an order that it allows the second time.

    In a running job rank 0 proposes an order for all by measured times. Then all ranks run both
    orders in turn, with their messages, and keep the present one unless eight of nine such pairs
    of steps were faster with the other.

    Attributes:
        link: ``measure`` plans with the job's own link; a name of `graphopt.network.clusters`
            with that machine's.
        memory: how much peak memory may grow, as a share of it: what is put off keeps its operands
            alive for longer.
    """

    name: ClassVar[str] = "schedule"
    numerics: ClassVar[Numerics] = EXACT
    levels: ClassVar[frozenset[str]] = frozenset({"joint"})
    provides: ClassVar[frozenset[str]] = frozenset({"scheduled"})
    conflicts: ClassVar[frozenset[str]] = frozenset({"grouped"})
    idempotent: ClassVar[bool] = False
    symbolic: ClassVar[bool] = True
    source: ClassVar[str] = "Oh et al., EuroSys 2022; Johnson 1954 and Sidney 1979 for the order"

    link: str = "measure"
    memory: float = 0.25

    def __post_init__(self) -> None:
        if not self.memory >= 0:
            raise ValueError(f"memory is {self.memory}, not a share of zero or more")

    def apply(self, graph: Graph, ctx: PassContext) -> Outcome:
        """Reorder `graph`, or decline with the predicted times."""
        world = ctx.size("dp")
        if world == 1:
            return _declined("one-rank", "there is one rank, so nothing has to be reduced")
        order = graph.get(gradient_order)
        if not order.ready:
            return _declined("no-gradients", "no parameter receives a gradient")
        if order.sparse:
            detail = f"the gradient of {order.sparse[0]!r} has no size to plan with"
            return _declined("sparse", detail)
        choice = self._choice(graph, ctx, world)
        if not choice["order"]:
            return _declined(choice["reason"], choice["detail"], choice["numbers"])
        if choice["graph"] != outline(graph):
            return _declined("other-graph", "rank 0 chose the order for other operators")
        _rearrange(graph, choice)
        return Outcome((Applied("backward", choice["detail"], choice["numbers"]),))

    def _choice(self, graph: Graph, ctx: PassContext, world: int) -> dict[str, Any]:
        """The best order of this graph, or of rank 0's.

        All ranks send their messages in one order. A rank that computed in a different one would
        hold back messages that the others have ready, waiting for one that it does not.
        """
        ranks = ctx.ranks.get("dp")
        curve = link_curve(self.link, world, ranks)

        def search(order: GradientOrder) -> OrderSearch:
            return OrderSearch(graph, order, curve, world, self.memory)

        known_by = {"graph": outline(graph), "tail": [node.name for node in tail(graph)]}
        order = graph.get(gradient_order)
        if ranks is None:
            return {**search(order).best(), **known_by}

        def decide() -> str:
            mine = search(measured_order(graph, profile_graph(graph)))
            return json.dumps({**mine.best(), **known_by})

        known = "\n".join([f"passes {self}", *order.sizes])
        choice: dict[str, Any] = json.loads(ranks.agree("gradients", known, decide))
        if not choice["order"]:
            return choice
        ratios = ranks.together("order", known, lambda send: self._tried(graph, choice, send))
        return confirmed(choice, json.loads(ratios))

    def _tried(self, graph: Graph, choice: Mapping[str, Any], send: Send) -> str:
        """The ratios of `race`; a rank that would keep its order keeps it here, too."""
        other = graph.copy()
        if choice["graph"] == outline(graph):
            _rearrange(other, choice)
        present, chosen = (
            step_of(*one, send) for one in zip((graph, other), choice["groups"], strict=True)
        )
        return json.dumps(race(present, chosen, send, device_of(graph)))


def _rearrange(graph: Graph, choice: Mapping[str, Any]) -> None:
    own = renamed(choice["tail"], graph)
    arrange(graph, [own[n] for n in choice["split"]], [own[n] for n in choice["order"]])


def _declined(reason: str, detail: str, numbers: Mapping[str, Number] | None = None) -> Outcome:
    return Outcome(declined=(Declined("backward", reason, detail, numbers or {}),))
