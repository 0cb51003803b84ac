"""Sends and receives for schedules of computations."""

from __future__ import annotations

from dataclasses import replace

from graphopt.schedules.actions import Action, Kind, Schedule
from graphopt.schedules.execution import computed, split_backwards

# How long computations take when the order of transfers is decided: only ratios matter.
UNITS = {Kind.F: 1.0, Kind.B: 2.0, Kind.I: 1.0, Kind.W: 1.0, Kind.UPDATE: 0.0}


def with_transfers(schedule: Schedule) -> Schedule:
    """The same schedule with sends and receives; one that has some is returned as it is.

    All transfers get a place in one order of events: behind the computation that they send from,
    and before any that starts later. Every rank follows that order, so that it cannot deadlock,
    even if a send blocks until it is received.
    """
    if schedule.has_transfers:
        return schedule
    split = split_backwards(schedule)
    times = computed(schedule, lambda action: UNITS[action.kind])
    # At the same time, what has ended is sent before something new starts.
    events: list[tuple[float, int, int, Action]] = []
    order = {action: i for line in schedule.ranks for i, action in enumerate(line)}
    for action, (start, end) in times.items():
        events.append((start, 1, order[action], action))
        send = _send(action, schedule, split)
        if send is not None:
            events.append((end, 0, order[action], send))
    events.sort(key=lambda e: (e[0], e[1], e[2], e[3].stage))
    lines: list[list[Action]] = [[] for _ in schedule.ranks]
    for _, _, _, action in events:
        lines[schedule.placement[action.stage]].append(action)
        if action.kind in (Kind.SEND_F, Kind.SEND_B):
            received = action.partner
            lines[schedule.placement[received.stage]].append(received)
    return replace(schedule, ranks=tuple(map(tuple, lines)))


def without_transfers(schedule: Schedule) -> Schedule:
    """Only the computations and updates of a schedule."""
    kept = tuple(tuple(a for a in line if a.kind in UNITS) for line in schedule.ranks)
    return replace(schedule, ranks=kept)


def _send(action: Action, schedule: Schedule, split: frozenset[tuple[int, int]]) -> Action | None:
    stage, batch = action.stage, action.micro_batch
    if action.kind is Kind.F and stage < schedule.stages - 1 and schedule.crosses(stage):
        return Action(stage, Kind.SEND_F, batch)
    gives = action.kind is Kind.I or (action.kind is Kind.B and (stage, batch) not in split)
    if gives and stage > 0 and schedule.crosses(stage - 1):
        return Action(stage, Kind.SEND_B, batch)
    return None
