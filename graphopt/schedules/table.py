"""Schedules as comma-separated values, one line per rank: what torch's pipeline runtime reads."""

from __future__ import annotations

from graphopt.errors import ArgumentError
from graphopt.schedules.actions import Action, Kind, Schedule
from graphopt.schedules.laws import SYNCHRONOUS


def to_csv(schedule: Schedule) -> str:
    """The actions of each rank in one line.

    Raises:
        ArgumentError: the schedule updates as it goes, for which the format has no action.
    """
    for rank, line in enumerate(schedule.ranks):
        for action in line:
            if action.kind is Kind.UPDATE:
                raise ArgumentError(
                    f"schedule {schedule.name!r} updates as it goes",
                    where=f"rank {rank}: {action}",
                    hint=f"torch runs {', '.join(SYNCHRONOUS)} and interleaved schedules",
                )
    return "".join(",".join(map(str, line)) + "\n" for line in schedule.ranks)


def from_csv(text: str, name: str = "csv") -> Schedule:
    """Read such lines; where stages are and how many micro-batches there are follows from them.

    Raises:
        ArgumentError: a field is not an action, or a stage is on two ranks or on none.
    """
    ranks = []
    for rank, line in enumerate(text.splitlines()):
        words = [word.strip() for word in line.split(",") if word.strip()]
        ranks.append(tuple(Action.parse(word, f"line {rank + 1}") for word in words))
    owner: dict[int, int] = {}
    for rank, actions in enumerate(ranks):
        for action in actions:
            if owner.setdefault(action.stage, rank) != rank:
                raise ArgumentError(
                    f"stage {action.stage} is on ranks {owner[action.stage]} and {rank}",
                    where=f"line {rank + 1}: {action}",
                )
    missing = sorted(set(range(max(owner, default=0) + 1)) - owner.keys())
    if missing:
        raise ArgumentError(f"stage {missing[0]} is on no rank", where="csv")
    batches = 1 + max(action.micro_batch for actions in ranks for action in actions)
    return Schedule(name, tuple(owner[s] for s in sorted(owner)), batches, tuple(ranks))
