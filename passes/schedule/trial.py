"""Whether an order that is predicted to be better also is when it runs.

The search takes the best of many orders by one noisy profile, so its favourite looks better than it
is; and it assumes that the halves of a split convolution take half the time each. Both show when
the rewritten graph is measured itself, in turn with the present one.
"""

from __future__ import annotations

from typing import Any

from graphopt.analysis.gradient_order import measured_order
from graphopt.analysis.profile import measure_in_turn
from graphopt.passes.schedule.rewrite import arrange
from graphopt.passes.schedule.search import Search, milliseconds

# Below this share of the time to the last reduced gradient, the two profiles may differ by chance.
LEAST_MEASURED_GAIN = 0.01


def confirmed(search: Search, choice: dict[str, Any]) -> dict[str, Any]:
    """`choice` if it also gains by times of its own, else the decision to keep the present order.

    Args:
        search: what has found the choice; its graph must run on this machine, without collectives.
        choice: from `Search.best`.

    Returns:
        The decision in the form of `Search.best`; its numbers hold what was measured now.
    """
    if not choice["order"]:
        return choice
    trial = search.graph.copy()
    arrange(trial, choice["split"], choice["order"])
    graphs = (search.graph, trial)
    before, after = (
        search.grouping(measured_order(graph, seconds)).finish
        for graph, seconds in zip(graphs, measure_in_turn(graphs), strict=True)
    )
    numbers = choice["numbers"] | {
        "retried_ms": milliseconds(before),
        "retried_scheduled_ms": milliseconds(after),
    }
    if after <= (1 - LEAST_MEASURED_GAIN) * before:
        return {**choice, "numbers": numbers}
    detail = "the best order found did not gain when it was measured itself"
    return {"order": [], "reason": "not-confirmed", "detail": detail, "numbers": numbers}
