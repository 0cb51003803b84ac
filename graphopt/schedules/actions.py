"""The language of schedules: what each rank does, action by action.

An action is written as its stage, its kind and its micro-batch: ``0F3`` is the forward of
micro-batch 3 in stage 0, ``2SEND_B1`` sends the gradient of stage 2's input back. The spelling is
that of `torch.distributed.pipelining`, which has no ``UPDATE``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

from graphopt.errors import ArgumentError


class Kind(StrEnum):
    """What an action does.

    ``F``: forward. ``B``: whole backward. ``I``: gradient of the input only; ``W``: gradients of
    the parameters, later. ``UPDATE``: apply the gradients that were accumulated up to this
    micro-batch. ``SEND_F`` and ``RECV_F`` pass on the output of a stage and take the input of one,
    ``SEND_B`` and ``RECV_B`` the gradient of an input and of an output.
    """

    F = "F"
    B = "B"
    I = "I"  # noqa: E741
    W = "W"
    UPDATE = "UPDATE"
    SEND_F = "SEND_F"
    RECV_F = "RECV_F"
    SEND_B = "SEND_B"
    RECV_B = "RECV_B"


COMPUTE = frozenset({Kind.F, Kind.B, Kind.I, Kind.W})
TRANSFERS = frozenset({Kind.SEND_F, Kind.RECV_F, Kind.SEND_B, Kind.RECV_B})

_ACTION = re.compile(rf"(\d+)({'|'.join(sorted(Kind, key=len, reverse=True))})(\d+)")


@dataclass(frozen=True, order=True)
class Action:
    """One thing that one rank does.

    Attributes:
        stage: from 0.
        kind: what is done.
        micro_batch: from 0.
    """

    stage: int
    kind: Kind
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.micro_batch}"

    @classmethod
    def parse(cls, text: str, where: str = "") -> Action:
        """Read one action; `where` names its place in errors."""
        found = _ACTION.fullmatch(text)
        if found is None:
            kinds = ", ".join(Kind)
            raise ArgumentError(
                f"{text!r} is not an action",
                where=where,
                hint=f"write stage, kind and micro-batch, as in 0F3; kinds are {kinds}",
            )
        return cls(int(found[1]), Kind(found[2]), int(found[3]))

    @property
    def partner(self) -> Action:
        """The receive of a send and the send of a receive, in the neighbouring stage."""
        partners = {
            Kind.SEND_F: (1, Kind.RECV_F),
            Kind.RECV_F: (-1, Kind.SEND_F),
            Kind.SEND_B: (-1, Kind.RECV_B),
            Kind.RECV_B: (1, Kind.SEND_B),
        }
        step, kind = partners[self.kind]
        return Action(self.stage + step, kind, self.micro_batch)


@dataclass(frozen=True)
class Schedule:
    """What every rank does in one step, or in one run without flushes.

    Attributes:
        name: what it is called.
        placement: the rank of each stage.
        micro_batches: how many there are.
        ranks: the actions of each rank, in order.
    """

    name: str
    placement: tuple[int, ...]
    micro_batches: int
    ranks: tuple[tuple[Action, ...], ...]

    @property
    def stages(self) -> int:
        """Number of stages."""
        return len(self.placement)

    @property
    def has_transfers(self) -> bool:
        """Whether sends and receives are written down."""
        return any(a.kind in TRANSFERS for actions in self.ranks for a in actions)

    def crosses(self, stage: int) -> bool:
        """Whether what goes from `stage` to the next one changes ranks."""
        return self.placement[stage] != self.placement[stage + 1]

    def __str__(self) -> str:
        ranks = " ".join(map(str, self.placement))
        lines = [f"schedule {self.name}", f"stages on ranks {ranks}"]
        lines.append(f"micro-batches {self.micro_batches}")
        for rank, actions in enumerate(self.ranks):
            lines.append(" ".join((f"rank {rank}:", *map(str, actions))))
        return "\n".join(lines) + "\n"


_HEADER = (
    re.compile(r"schedule (\S+)"),
    re.compile(r"stages on ranks (\d+(?: \d+)*)"),
    re.compile(r"micro-batches (\d+)"),
)
_EXAMPLE = ("schedule 1f1b", "stages on ranks 0 1", "micro-batches 4")


def parse_schedule(text: str) -> Schedule:
    """Read what printing a schedule gives.

    Raises:
        ArgumentError: a line cannot be read; says which.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if len(lines) < len(_HEADER):
        raise ArgumentError("the text of a schedule ends too early", where=f"line {len(lines)}")
    found = []
    for number, (pattern, line) in enumerate(zip(_HEADER, lines, strict=False)):
        match = pattern.fullmatch(line)
        if match is None:
            raise ArgumentError(
                f"{line!r} is not the header of a schedule",
                where=f"line {number + 1}",
                hint=f"write for example {_EXAMPLE[number]!r}",
            )
        found.append(match[1])
    ranks = []
    for rank, line in enumerate(lines[len(_HEADER) :]):
        place = f"line {rank + len(_HEADER) + 1}"
        start, colon, actions = line.partition(":")
        if not colon or start != f"rank {rank}":
            raise ArgumentError(
                f"{line!r} is not the line of rank {rank}",
                where=place,
                hint=f"begin it with 'rank {rank}:'",
            )
        ranks.append(
            tuple(
                Action.parse(word, f"{place}, action {index}")
                for index, word in enumerate(actions.split(), start=1)
            )
        )
    placement = tuple(map(int, found[1].split()))
    return Schedule(found[0], placement, int(found[2]), tuple(ranks))
