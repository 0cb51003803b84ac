"""What an action waits for, and when it runs if transfers are free."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from graphopt.errors import ArgumentError
from graphopt.schedules.actions import TRANSFERS, Action, Kind, Schedule

Span = tuple[float, float]


def waits_for(
    action: Action, schedule: Schedule, split: frozenset[tuple[int, int]]
) -> list[Action]:
    """The computations that have to be done before a computation or an update.

    Args:
        action: of the schedule.
        schedule: with all actions.
        split: stages and micro-batches whose backward is split (`split_backwards`).
    """
    stage, batch = action.stage, action.micro_batch
    if action.kind is Kind.F:
        return [Action(stage - 1, Kind.F, batch)] if stage else []
    if action.kind in (Kind.B, Kind.I):
        own = [Action(stage, Kind.F, batch)]
        if stage < schedule.stages - 1:
            own.append(gives_gradient(stage + 1, batch, split))
        return own
    if action.kind is Kind.W:
        return [Action(stage, Kind.I, batch)]
    if action.kind is Kind.UPDATE:
        whole = (stage, batch) not in split
        return [Action(stage, Kind.B if whole else Kind.W, batch)]
    if action.kind is Kind.SEND_F:
        return [Action(stage, Kind.F, batch)]
    if action.kind is Kind.SEND_B:
        return [gives_gradient(stage, batch, split)]
    return []


def gives_gradient(stage: int, batch: int, split: frozenset[tuple[int, int]]) -> Action:
    """The action that computes the gradient of a stage's input."""
    return Action(stage, Kind.I if (stage, batch) in split else Kind.B, batch)


def split_backwards(schedule: Schedule) -> frozenset[tuple[int, int]]:
    """Stages and micro-batches whose backward is split into ``I`` and ``W``."""
    return frozenset(
        (a.stage, a.micro_batch) for line in schedule.ranks for a in line if a.kind is Kind.I
    )


def computed(schedule: Schedule, seconds: Callable[[Action], float]) -> dict[Action, Span]:
    """Start and end of each computation where transfers take no time.

    Raises:
        ArgumentError: ranks wait for each other.
    """
    split = split_backwards(schedule)
    lines = [[a for a in line if a.kind not in TRANSFERS] for line in schedule.ranks]
    place = [0] * len(lines)
    clock = [0.0] * len(lines)
    done: dict[Action, Span] = {}

    def advance(rank: int) -> Iterator[Action]:
        while place[rank] < len(lines[rank]):
            action = lines[rank][place[rank]]
            needed = waits_for(action, schedule, split)
            if any(n not in done for n in needed):
                return
            start = max([clock[rank], *(done[n][1] for n in needed)])
            clock[rank] = start + seconds(action)
            done[action] = (start, clock[rank])
            place[rank] += 1
            yield action

    while any(list(advance(rank)) for rank in range(len(lines))):
        pass
    refuse_stuck([line[p:] for line, p in zip(lines, place, strict=True)])
    return done


def refuse_stuck(left: list[list[Action]]) -> None:
    """Raise an error that names what each rank waits at, if any does."""
    stuck = [(rank, line[0]) for rank, line in enumerate(left) if line]
    if stuck:
        where = ", ".join(f"rank {rank} at {action}" for rank, action in stuck)
        raise ArgumentError(
            "the ranks wait for each other",
            where=where,
            hint="put each action behind what it needs, and sends and receives in the same order",
        )
