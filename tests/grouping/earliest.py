"""The finish of the best plan, without what the planner trades away for fewer groups."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from graphopt.grouping.planner import in_ready_order
from graphopt.grouping.search import GroupSearch
from graphopt.plan.grouping import Ready


def earliest_finish(ready: Sequence[Ready], cost: Callable[[float], float]) -> float:
    order = in_ready_order(ready)
    return GroupSearch([(r.bytes, r.seconds, r.kind) for r in order], cost).finish
