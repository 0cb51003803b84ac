"""The best partition of a space for each objective, by searches under tightening limits."""

from __future__ import annotations

import math
from dataclasses import replace

from graphopt.partitioning.bounds import Bounds
from graphopt.partitioning.dynamic import Chain, Limits, Search
from graphopt.partitioning.objective import ALPA, GPIPE, Objective
from graphopt.partitioning.space import Floats, Space

# What counts as an improvement, relative: larger than the rounding of sums, smaller than any time.
STRICTLY = 1 - 1e-10
SHARES = (0.02, 0.05, 0.1, 0.2, 0.4)  # between the least maximum and the highest useful limit


def solve(space: Space, stages: int, bounds: Bounds, upper: float = math.inf) -> Chain | None:
    """The best partition; its score is the value of the objective. None where nothing fits.

    Args:
        space: the downsets to cut at.
        stages: how many stages.
        bounds: what no partition can beat.
        upper: value of a known partition; only such as are not worse are looked for.
    """
    objective = space.objective
    bounds = bounds.with_cuts(
        stages,
        _least(space.cut_forward),
        _least(space.cut_backward),
        _least(space.cut_forward + space.cut_backward),
        overlap=objective.overlap,
    )
    if objective.kind == GPIPE:
        return _gpipe(space, stages, bounds, upper)
    if objective.kind == ALPA and objective.micro_batches > 1:
        return _alpa(space, stages, bounds, upper)
    if objective.kind == ALPA:
        return Search(space, stages).best("latency")
    search = Search(space, stages, Limits(whole=upper))
    best = search.best("whole")
    return None if best is None else _least_sent(search, best, Limits(whole=best.whole))


def _least_sent(search: Search, best: Chain, limits: Limits) -> Chain:
    """Of all partitions as good as the best one, one whose transfers take least together."""
    space = search.space
    if not (space.cut_forward.any() or space.cut_backward.any()):
        return best
    found = search.best("latency", limits)
    return best if found is None else replace(found, score=best.score)


def _least(cuts: Floats) -> float:
    """The least of the cuts behind some and before other atoms."""
    return float(cuts[1:-1].min()) if cuts.size > 2 else 0.0


def worth(chain: Chain, objective: Objective) -> float:
    """The objective's value of a chain."""
    if objective.kind == GPIPE:
        return chain.forward + chain.backward
    if objective.kind == ALPA:
        return chain.latency + (objective.micro_batches - 1) * chain.whole
    return chain.whole


def _alpa(space: Space, stages: int, bounds: Bounds, upper: float) -> Chain | None:
    """Least ``sum + (M - 1) max``.

    The least sum under a limit of the maximum is found for falling limits. What has a smaller
    maximum has no smaller sum, so it is only better below ``(best - sum) / (M - 1)``.
    """
    others = space.objective.micro_batches - 1
    limit = (upper - bounds.total) / others
    search = Search(space, stages, Limits(whole=limit))
    fastest = search.best("whole")
    if fastest is None:
        return None
    best = replace(fastest, score=worth(fastest, space.objective))
    # Good partitions known early make the steps below longer.
    for share in SHARES:
        bent = fastest.whole + share * (min(limit, bounds.total) - fastest.whole)
        found = search.best("latency", Limits(whole=bent))
        if found is not None:
            best = _better(best, replace(found, score=worth(found, space.objective)))
    limit = (best.score - bounds.total) / others
    while limit >= fastest.whole * STRICTLY:
        found = search.best("latency", Limits(whole=limit))
        if found is None:
            break
        best = _better(best, replace(found, score=worth(found, space.objective)))
        limit = min((best.score - found.latency) / others, found.whole) * STRICTLY
    return best


def _gpipe(space: Space, stages: int, bounds: Bounds, upper: float) -> Chain | None:
    """Least ``max F + max B``: the least maximum of B under falling limits of F."""
    limits = Limits(forward=upper - bounds.backward, backward=upper - bounds.forward)
    search = Search(space, stages, limits)
    limit = limits.forward
    best: Chain | None = None
    while limit >= bounds.forward * STRICTLY:
        found = search.best("backward", replace(limits, forward=limit))
        if found is None:
            break
        best = _better(best, replace(found, score=worth(found, space.objective)))
        limit = min(best.score - found.backward, found.forward) * STRICTLY
    if best is None:
        return None
    return _least_sent(search, best, Limits(best.forward, best.backward))


def _better(best: Chain | None, found: Chain) -> Chain:
    return found if best is None or found.score < best.score else best
