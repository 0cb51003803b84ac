"""Whether a schedule can run, and what it holds and how late its gradients are."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from graphopt.errors import ArgumentError
from graphopt.schedules.actions import COMPUTE, TRANSFERS, Action, Kind, Schedule
from graphopt.schedules.execution import refuse_stuck, split_backwards, waits_for


@dataclass(frozen=True)
class Checked:
    """What is known about a schedule that can run.

    Attributes:
        in_flight: micro-batches that each stage holds at most.
        rank_in_flight: stages times micro-batches that each rank holds at most.
        delays: updates of each stage between a forward and its own update, at most.
    """

    in_flight: tuple[int, ...]
    rank_in_flight: tuple[int, ...]
    delays: tuple[int, ...]


def check(schedule: Schedule, *, blocking: bool = True) -> Checked:
    """Refuse a schedule that cannot run.

    Every stage has to do the forward and the whole backward of every micro-batch once, on its own
    rank, and behind what it needs. With sends and receives, all of those between ranks have to be
    there, and none may wait for ever.

    Args:
        schedule: with or without sends and receives.
        blocking: whether a send waits until it is received.

    Raises:
        ArgumentError: names the rank, the action, and what is wrong.
    """
    _check_form(schedule)
    _check_complete(schedule)
    if schedule.has_transfers:
        _check_transfers(schedule)
    _run(schedule, blocking)
    stages = range(schedule.stages)
    lines = schedule.ranks
    return Checked(
        tuple(_held(lines[schedule.placement[s]], s) for s in stages),
        tuple(_held(line, None) for line in lines),
        tuple(_delay(lines[schedule.placement[s]], s) for s in stages),
    )


def _check_form(schedule: Schedule) -> None:
    ranks = len(schedule.ranks)
    if not schedule.placement or not all(0 <= r < ranks for r in schedule.placement):
        raise ArgumentError(
            f"stages are placed on ranks {schedule.placement}, and there are {ranks}",
            where="placement",
        )
    for rank, line in enumerate(schedule.ranks):
        for action in line:
            known = action.stage < schedule.stages
            if not known or action.micro_batch >= schedule.micro_batches:
                raise ArgumentError(
                    f"there are {schedule.stages} stages, {schedule.micro_batches} micro-batches",
                    where=f"rank {rank}: {action}",
                )
            if schedule.placement[action.stage] != rank:
                raise ArgumentError(
                    f"stage {action.stage} is on rank {schedule.placement[action.stage]}",
                    where=f"rank {rank}: {action}",
                )


def _check_complete(schedule: Schedule) -> None:
    count = Counter(action for line in schedule.ranks for action in line)
    twice = [action for action, number in count.items() if number > 1]
    if twice:
        rank = schedule.placement[twice[0].stage]
        raise ArgumentError(f"{twice[0]} is done twice", where=f"rank {rank}: {twice[0]}")
    for stage in range(schedule.stages):
        for batch in range(schedule.micro_batches):
            has = {kind for kind in COMPUTE if Action(stage, kind, batch) in count}
            if has not in ({Kind.F, Kind.B}, {Kind.F, Kind.I, Kind.W}):
                done = ", ".join(sorted(has)) or "nothing"
                raise ArgumentError(
                    f"stage {stage} does {done} of micro-batch {batch}",
                    where=f"rank {schedule.placement[stage]}",
                    hint="each one needs F and B, or F, I and W",
                )


def _check_transfers(schedule: Schedule) -> None:
    present = {a for line in schedule.ranks for a in line if a.kind in TRANSFERS}
    needed = set()
    for stage in range(schedule.stages - 1):
        if schedule.crosses(stage):
            for batch in range(schedule.micro_batches):
                for send in (
                    Action(stage, Kind.SEND_F, batch),
                    Action(stage + 1, Kind.SEND_B, batch),
                ):
                    needed |= {send, send.partner}
    for what, actions in (("is missing", needed - present), ("has no purpose", present - needed)):
        if actions:
            first = min(actions)
            raise ArgumentError(
                f"{first} {what}",
                where=f"rank {schedule.placement[first.stage]}",
                hint="graphopt.schedules.transfers.with_transfers adds all sends and receives",
            )


def _run(schedule: Schedule, blocking: bool) -> None:
    """Let every rank go as far as it can, until all are done or none moves."""
    split = split_backwards(schedule)
    place = [0] * len(schedule.ranks)
    done: set[Action] = set()
    received = schedule.has_transfers

    def head(rank: int) -> Action | None:
        line = schedule.ranks[rank]
        return line[place[rank]] if place[rank] < len(line) else None

    def ready(action: Action) -> bool:
        if action.kind in (Kind.RECV_F, Kind.RECV_B):
            return action.partner in done
        if action.kind in (Kind.SEND_F, Kind.SEND_B):
            computed = all(n in done for n in waits_for(action, schedule, split))
            other = schedule.placement[action.partner.stage]
            return computed and (not blocking or head(other) == action.partner)
        needed = waits_for(action, schedule, split)
        if received:
            needed = [_through(n, action, schedule) for n in needed]
        return all(n in done for n in needed)

    moved = True
    while moved:
        moved = False
        for rank in range(len(place)):
            while (action := head(rank)) is not None and ready(action):
                done.add(action)
                place[rank] += 1
                moved = True
    refuse_stuck([list(line[p:]) for line, p in zip(schedule.ranks, place, strict=True)])


def _through(needed: Action, by: Action, schedule: Schedule) -> Action:
    """The receive through which a rank learns of another rank's computation."""
    if schedule.placement[needed.stage] == schedule.placement[by.stage]:
        return needed
    kind = Kind.RECV_F if needed.stage < by.stage else Kind.RECV_B
    return Action(by.stage, kind, by.micro_batch)


def _held(line: tuple[Action, ...], stage: int | None) -> int:
    held = most = 0
    for action in line:
        if stage is None or action.stage == stage:
            held += (action.kind is Kind.F) - (action.kind in (Kind.B, Kind.W))
            most = max(most, held)
    return most


def _delay(line: tuple[Action, ...], stage: int) -> int:
    """Updates between a micro-batch's forward and the update that uses its gradient."""
    updates, most = 0, 0
    seen: dict[int, int] = {}
    waiting: list[int] = []
    for action in line:
        if action.stage != stage:
            continue
        if action.kind is Kind.F:
            seen[action.micro_batch] = updates
        elif action.kind in (Kind.B, Kind.W):
            waiting.append(action.micro_batch)
        elif action.kind is Kind.UPDATE:
            most = max([most, *(updates - seen[m] for m in waiting)])
            waiting.clear()
            updates += 1
    return most
