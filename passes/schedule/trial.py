"""Does a predicted gain hold when the order runs?

The best of many orders by one noisy profile looks better than it is, and the search assumes that
both halves of a split convolution take half the time. Measuring the rewritten graph itself, in turn
with the present one, corrects both.
"""

from __future__ import annotations

from typing import Any

from graphopt.analysis.gradient_order import measured_order
from graphopt.analysis.profile import profile_in_turn
from graphopt.passes.schedule.rewrite import arrange
from graphopt.passes.schedule.search import OrderSearch, milliseconds

# Smaller gains, as a share of the time to the last reduced gradient, may be noise.
LEAST_MEASURED_GAIN = 0.01


def confirmed(search: OrderSearch, choice: dict[str, Any]) -> dict[str, Any]:
    """`choice` if it also gains by its own measured times, else to keep the present order.

    Args:
        search: what found the choice; its graph must run on this machine, without collectives.
        choice: from `OrderSearch.best`.

    Returns:
        The decision in the form of `OrderSearch.best`; its numbers hold what was measured now.
    """
    if not choice["order"]:
        return choice
    trial = search.graph.copy()
    arrange(trial, choice["split"], choice["order"])
    graphs = (search.graph, trial)
    before, after = (
        search.grouping(measured_order(graph, seconds)).finish
        for graph, seconds in zip(graphs, profile_in_turn(graphs), strict=True)
    )
    numbers = choice["numbers"] | {
        "retried_ms": milliseconds(before),
        "retried_scheduled_ms": milliseconds(after),
    }
    if after <= (1 - LEAST_MEASURED_GAIN) * before:
        return {**choice, "numbers": numbers}
    detail = "the best order found did not gain when it was measured itself"
    return {"order": [], "reason": "not-confirmed", "detail": detail, "numbers": numbers}
