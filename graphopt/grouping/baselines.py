"""Baselines: other ways of grouping gradients, scored with the same costs as our plan.

Every function takes gradients in the order in which they become ready and returns groups in the
order in which the channel carries them. Groups never mix kinds; each gradient is in exactly one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from graphopt.network.curve import of_group
from graphopt.plan.grouping import Group, Ready

Cost = Callable[[float], float]

MIB = 1 << 20
DDP_CAPS = (MIB, 25 * MIB)
UNIFORM_CAPS = tuple(int(mib * MIB) for mib in (0.5, 1, 2, 4, 8, 12, 16, 25, 40, 64))


def timed(groups: Iterable[Group], cost: Cost) -> tuple[Group, ...]:
    """`groups` with the time at which one in-order channel has reduced each, in seconds."""
    done, clock = [], 0.0
    for group in groups:
        clock = max(clock, group.ready) + of_group(cost, group.bytes, len(group.names))
        done.append(replace(group, finish=clock))
    return tuple(done)


def finish_time(groups: Iterable[Group], cost: Cost) -> float:
    """Seconds until one in-order channel has reduced the last of `groups`; 0 without any."""
    clock = 0.0
    for group in groups:
        clock = max(clock, group.ready) + of_group(cost, group.bytes, len(group.names))
    return clock


def group_of(members: Sequence[Ready]) -> Group:
    """The group of these gradients, all of one kind; it is ready when the last of them is."""
    return Group(
        names=tuple(r.name for r in members),
        bytes=sum(r.bytes for r in members),
        kind=members[0].kind,
        ready=max(r.seconds for r in members),
    )


def by_kind(ready: Iterable[Ready]) -> dict[str, list[Ready]]:
    """The gradients of each kind, in order."""
    kinds: dict[str, list[Ready]] = {}
    for r in ready:
        kinds.setdefault(r.kind, []).append(r)
    return kinds


def in_turn(parts: Iterable[Sequence[Ready]]) -> tuple[Group, ...]:
    """A group for each part, the earliest ready first: no other order finishes sooner."""
    return tuple(sorted(map(group_of, parts), key=lambda g: g.ready))


def capped(ready: Sequence[Ready], caps: Sequence[int]) -> tuple[Group, ...]:
    """Buckets as `DistributedDataParallel` fills them in arrival order.

    The gradient that reaches the cap closes its bucket, so a bucket may exceed the cap. Each kind
    goes through `caps` (bytes) separately and stays at the last one. Buckets
    that never reach their cap come last.
    """
    groups: list[Group] = []
    open_: dict[str, list[Ready]] = {}
    filled: dict[str, int] = {}
    closed: dict[str, int] = {}
    for r in ready:
        open_.setdefault(r.kind, []).append(r)
        filled[r.kind] = filled.get(r.kind, 0) + r.bytes
        number = closed.get(r.kind, 0)
        if filled[r.kind] >= caps[min(number, len(caps) - 1)]:
            groups.append(group_of(open_.pop(r.kind)))
            closed[r.kind], filled[r.kind] = number + 1, 0
    return (*groups, *in_turn(open_.values()))


def ddp_default(ready: Sequence[Ready]) -> tuple[Group, ...]:
    """The buckets of `DistributedDataParallel` once it knows the order of arrival."""
    return capped(ready, DDP_CAPS)


def best_uniform(ready: Sequence[Ready], cost: Cost) -> tuple[str, tuple[Group, ...]]:
    """The best of `UNIFORM_CAPS`, by name (``"uniform 4 MiB"``); the larger cap where they tie."""
    plans = [(cap, capped(ready, (cap,))) for cap in reversed(UNIFORM_CAPS)]
    cap, groups = min(plans, key=lambda plan: finish_time(plan[1], cost))
    return f"uniform {cap / MIB:g} MiB", groups


def one_group(ready: Sequence[Ready]) -> tuple[Group, ...]:
    """Everything at the end of backward; one group per kind."""
    return in_turn(by_kind(ready).values())


def per_layer(ready: Sequence[Ready]) -> tuple[Group, ...]:
    """One group for each module that owns parameters, as Laanait et al. grouped them.

    A gradient without a module belongs to the prefix of its name.
    """
    parts: dict[tuple[str, str], list[Ready]] = {}
    for r in ready:
        parts.setdefault((r.module or r.name.rpartition(".")[0], r.kind), []).append(r)
    return in_turn(parts.values())


def mg_wfbp(ready: Sequence[Ready], cost: Cost) -> tuple[Group, ...]:
    """The greedy rule of MG-WFBP (Shi et al.), which knows a start-up and a time per byte.

    Those two are the line through the costs of the smallest gradient and of all together. A
    gradient joins the next one if that is ready before its own reduction would be done, and either
    the channel is not free before then or waiting costs less than a start-up. Kinds are grouped
    separately, each as if it had the channel to itself.
    """
    total = sum(r.bytes for r in ready)
    small = min((r.bytes for r in ready), default=0)
    slope = (cost(total) - cost(small)) / (total - small) if total > small else 0.0
    startup = max(0.0, cost(small) - slope * small)
    return in_turn(p for one in by_kind(ready).values() for p in _merged(one, startup, slope))


def _merged(ready: Sequence[Ready], startup: float, slope: float) -> list[list[Ready]]:
    """The parts into which MG-WFBP's rule divides gradients of one kind."""
    parts: list[list[Ready]] = [[]]
    free, size = 0.0, 0
    for r, following in zip(ready, (*ready[1:], None), strict=True):
        parts[-1].append(r)
        size += r.bytes
        start = max(free, r.seconds)
        took = startup + slope * size
        if following is None:
            break
        arrives = following.seconds
        if arrives < start + took and (start > arrives or arrives - start < startup):
            free = start
        else:
            free, size = start + took, 0
            parts.append([])
    return [part for part in parts if part]
