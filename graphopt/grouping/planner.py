"""Which gradients to reduce together: the exact plan, its certificate and its baselines.

A plan is a sequence of groups (buckets) on one in-order channel. The planner finds the earliest
finish of any plan (`graphopt.grouping.search`), then takes the fewest groups that come close to it:
many plans tie, and fewer messages suffer less from jitter, which no cost curve shows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from graphopt.errors import ArgumentError
from graphopt.grouping.baselines import (
    best_uniform,
    ddp_default,
    finish_time,
    group_of,
    mg_wfbp,
    one_group,
    per_layer,
    timed,
)
from graphopt.grouping.search import GroupSearch
from graphopt.plan.grouping import Candidate, Group, Grouping, Ready

Cost = Callable[[float], float]

# What fewer groups may cost: this share of the finish, but at most that share of what is exposed,
# since a tenth of a percent of a long backward can be most of a short tail.
DELTA = 0.001
DELTA_EXPOSED = 0.002


def plan(
    ready: Sequence[Ready],
    cost: Cost,
    backward: float,
    *,
    link: str = "",
    times: str = "",
    world: int = 1,
) -> Grouping:
    """Group gradients so that the last one is reduced as early as possible.

    Exact for one kind of up to 2,000 gradients and for several kinds that share the channel as long
    as the search stays affordable; beyond that, neighbours are paired first. The result is never
    predicted slower than a candidate.

    Args:
        ready: the gradients, in any order; those ready at the same time keep their order.
        cost: seconds that one collective of so many bytes takes; must not fall with the size.
        backward: seconds of the backward pass without communication.
        link: where `cost` comes from, for reports.
        times: where the ready times come from, for reports.
        world: number of ranks, for reports.

    Raises:
        ArgumentError: a name occurs twice, a time or size is negative or not a number, or `cost`
            falls with the size.
    """
    _check(ready, backward)
    if not ready:
        return Grouping((), backward, 0.0, 0.0, link=link, times=times, world=world)
    order = in_ready_order(ready)
    baselines = candidates(order, cost)
    search = GroupSearch([(r.bytes, r.seconds, r.kind) for r in order], cost)
    best = min((finish_time(groups, cost) for groups in baselines.values()), default=math.inf)
    target = max(search.finish, min(search.finish + _slack(search.finish, backward), best))
    chosen = _groups(order, search.fewest(target))
    finish = finish_time(chosen, cost)
    if best < finish:  # only after pairing neighbours, or by rounding
        chosen = min(baselines.values(), key=lambda groups: finish_time(groups, cost))
        finish = best
    return Grouping(
        groups=timed(chosen, cost),
        backward=backward,
        finish=finish,
        bound=min(lower_bound(order, cost), finish),
        candidates=tuple(
            Candidate(name, tuple(g.bytes for g in groups), finish_time(groups, cost))
            for name, groups in baselines.items()
        ),
        link=link,
        times=times,
        world=world,
    )


def in_ready_order(ready: Sequence[Ready]) -> list[Ready]:
    """The gradients by the time at which they are ready; those ready together keep their order."""
    return sorted(ready, key=lambda r: r.seconds)


def lower_bound(ready: Sequence[Ready], cost: Cost) -> float:
    """Seconds before which no plan can finish, if splitting a message never makes it cheaper.

    What becomes ready from some moment on has to be sent after that moment, and takes at least as
    long as one message per kind.
    """
    left: dict[str, int] = {}
    bound = 0.0
    for r in reversed(in_ready_order(ready)):
        left[r.kind] = left.get(r.kind, 0) + r.bytes
        bound = max(bound, r.seconds + sum(map(cost, left.values())))
    return bound


def candidates(ready: Sequence[Ready], cost: Cost) -> dict[str, tuple[Group, ...]]:
    """Other plans for gradients in ready order, by name; of the uniform caps only the best."""
    name, uniform = best_uniform(ready, cost)
    return {
        "ddp default": ddp_default(ready),
        name: uniform,
        "one group": one_group(ready),
        "per layer": per_layer(ready),
        "mg-wfbp": mg_wfbp(ready, cost),
    }


def _groups(order: Sequence[Ready], parts: Sequence[tuple[int, ...]]) -> tuple[Group, ...]:
    return tuple(group_of([order[i] for i in part]) for part in parts)


def _slack(finish: float, backward: float) -> float:
    """Seconds that fewer groups may cost: see `DELTA`; while backward lasts, they cost nothing."""
    if finish <= backward:
        return min(DELTA * finish, backward - finish)
    return min(DELTA * finish, DELTA_EXPOSED * (finish - backward))


def _check(ready: Sequence[Ready], backward: float) -> None:
    seen: set[str] = set()
    for r in ready:
        if r.name in seen:
            raise ArgumentError(
                f"the gradient of {r.name} is given twice",
                where=r.name,
                hint="give a tied parameter once, with its last use",
            )
        seen.add(r.name)
        if not (math.isfinite(r.seconds) and r.seconds >= 0 and r.bytes >= 0):
            raise ArgumentError(
                f"the gradient of {r.name} has {r.bytes} bytes and is ready at {r.seconds} s",
                where=r.name,
                hint="sizes and times must be finite and not negative",
            )
    if not (math.isfinite(backward) and backward >= 0):
        raise ArgumentError(
            f"the backward pass cannot take {backward} s",
            where="backward",
            hint="give its duration in seconds",
        )
