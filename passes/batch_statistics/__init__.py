"""Batch norm without moving averages: evaluate with the statistics of the last steps."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from graphopt.analysis.hints import hint
from graphopt.errors import ArgumentError
from graphopt.graph import KEPT_META, Graph, value_of
from graphopt.passbase import EXACT, Applied, Declined, Numerics, Outcome, Pass, PassContext
from graphopt.passes.batch_statistics.sites import (
    Site,
    epsilon,
    find_sites,
    momentum,
    values_per_channel,
)
from graphopt.plan import Slot
from graphopt.plan.batch_statistics import COUNT, INVERSE, MEAN, Norm, Norms, Statistic
from graphopt.rewrite import emit
from graphopt.size_nodes import Sizes

aten = torch.ops.aten


@dataclass(frozen=True)
class BatchStatistics(Pass):
    """Let batch norms evaluate with the statistics of the last steps, over all ranks.

    When a step ends, the buffers of running statistics are set to mean and unbiased variance of all
    that the norm has seen in the last steps: all micro-batches, on all ranks, each value counted
    once. So `eval()`, `state_dict()` and export need nothing else. The modules' `momentum` is
    ignored; batches are still counted. Training is the same, bit for bit, because a norm in
    training does not read these buffers. A call without a backward, and calls within a step, renew
    the buffers as the module says; the end of the next step sets them again.

    Attributes:
        last: how many steps are taken together, those with other weights included.
    """

    name: ClassVar[str] = "batch_statistics"
    numerics: ClassVar[Numerics] = EXACT
    levels: ClassVar[frozenset[str]] = frozenset({"joint"})
    provides: ClassVar[frozenset[str]] = frozenset({"batch_statistics"})
    conflicts: ClassVar[frozenset[str]] = frozenset({"batch_statistics", "lowered", "staged"})
    changes_signature: ClassVar[bool] = True
    communicates: ClassVar[frozenset[str]] = frozenset({"dp"})
    symbolic: ClassVar[bool] = True
    idempotent: ClassVar[bool] = False
    source: ClassVar[str] = "Akiba et al., arXiv 1711.04325"

    last: int = 1

    def __post_init__(self) -> None:
        if self.last < 1:
            raise ArgumentError(
                f"batch_statistics: last={self.last} is not a number of steps",
                hint="leave it out for the statistics of the last step",
            )

    def apply(self, graph: Graph, ctx: PassContext) -> Outcome:
        """Return the statistics of each norm from the forward."""
        sites, declined = find_sites(graph)
        if not sites and not declined:
            detail = "no batch norm takes part in this call"
            return Outcome(declined=(Declined("model", "no-batch-norm", detail),))
        if not sites:
            return Outcome(declined=tuple(declined))
        results: dict[Slot, fx.Node] = {}
        sizes = Sizes(graph)
        for site in sites:
            results |= _results(graph, site, sizes)
        graph.set_outputs(results | dict(zip(graph.signature.outputs, graph.outputs, strict=True)))
        graph.changed()
        applied = tuple(self._applied(site) for site in sites)
        return Outcome(applied, tuple(declined), Norms(tuple(map(_norm, sites)), self.last))

    def _applied(self, site: Site) -> Applied:
        steps = "the last step" if self.last == 1 else f"the last {self.last} steps"
        values = sum(hint(values_per_channel(use)) or 0 for use in site.uses)
        return Applied(
            site.name,
            f"evaluates with the statistics of {steps}, whatever its momentum",
            {"values per channel": values, "momentum": momentum(site.uses[0])},
        )


def _norm(site: Site) -> Norm:
    channels = int(value_of(site.uses[0].all_input_nodes[0]).shape[1])
    return Norm(site.mean, site.var, channels, tuple(map(epsilon, site.uses)))


def _results(graph: Graph, site: Site, sizes: Sizes) -> dict[Slot, fx.Node]:
    found = {}
    for number, use in enumerate(site.uses):
        size = values_per_channel(use)
        values = None if isinstance(size, torch.SymInt) else size
        if values is None:
            found[Statistic(COUNT, number, None, site.mean).slot] = _count(graph, use, sizes)
        for index, what in ((1, MEAN), (2, INVERSE)):
            found[Statistic(what, number, values, site.mean).slot] = _item(graph, use, index)
    return found


def _count(graph: Graph, norm: fx.Node, sizes: Sizes) -> fx.Node:
    """How many values a norm takes the statistics of a channel from."""
    x = norm.all_input_nodes[0]
    with graph.fx.inserting_before(norm.next):
        found = sizes.all_of(x)
        count = sizes.product([*found[:1], *found[2:]], norm)
        shape: list[int] = []
        return emit(graph, aten.new_full.default, x, shape, count, like=norm, dtype=torch.float64)


def _item(graph: Graph, norm: fx.Node, index: int) -> fx.Node:
    """One result of a norm."""
    for user in norm.users:
        if user.target is operator.getitem and user.args[1] == index:
            return user
    with graph.fx.inserting_after(norm):
        item = graph.fx.call_function(operator.getitem, (norm, index))
    item.meta = {key: norm.meta[key] for key in KEPT_META if key in norm.meta}
    item.meta["val"] = value_of(norm)[index]
    return item
