"""Statistics of flex tensors on their way from the halves of a step to its end."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from graphopt.errors import RankError
from graphopt.plan import Role, Slot
from graphopt.plan.flexpoint import FlexTensors
from graphopt.runtime.engine.step import Backward, Forward, Step
from graphopt.runtime.ranks.ranks import Ranks

PREFIX = "flexpoint/"
# Under these a step keeps the statistics of its halves, int32 [k, 4], and of its weights.
FORWARD, BACKWARD, WEIGHTS = (PREFIX + name for name in ("forward", "backward", "weights"))

# Steps between two comparisons of ranks on a GPU.
LOOKS = 8

# Columns of what is added up: bits of the largest magnitude, of which the maximum counts; and sums
# of saturated elements, NaN, and all elements.
AMAX, SATURATED, NANS, ELEMENTS = range(4)


class _Taking:
    """Which result of a half are its statistics."""

    def __init__(self, returns: Sequence[Slot]) -> None:
        places = [i for i, s in enumerate(returns) if is_statistic(s)]
        self.place = places[0] if places else None
        self.returns = tuple(slot for slot in returns if not is_statistic(slot))

    def take(self, step: Step, results: Sequence[Any], key: str) -> list[Any]:
        """The other results; statistics stay in the step."""
        kept = list(results)
        if self.place is not None:
            step.own[key] = kept.pop(self.place)
        return kept


def is_statistic(slot: Slot) -> bool:
    """Whether an output of a half are statistics of flex tensors."""
    return slot.role is Role.AUX and slot.name.startswith(PREFIX)


class TakingForward:
    """A forward whose statistics stay in the step.

    Args:
        inner: the forward.
        first: what happens before it.
    """

    def __init__(self, inner: Forward, first: Callable[[Step], None]) -> None:
        self._inner, self._first, self._taking = inner, first, _Taking(inner.returns)
        self.returns = self._taking.returns

    def __call__(self, step: Step, inputs: list[Any]) -> Sequence[Any]:
        """See `Forward`."""
        self._first(step)
        return self._taking.take(step, self._inner(step, inputs), FORWARD)


class TakingBackward:
    """A backward whose statistics stay in the step."""

    def __init__(self, inner: Backward) -> None:
        self._inner, self._taking = inner, _Taking(inner.returns)
        self.returns = self._taking.returns

    def __call__(
        self, step: Step, tangents: Sequence[Tensor | None], absent: Collection[str]
    ) -> list[Any]:
        """See `Backward`."""
        return self._taking.take(step, self._inner(step, tangents, absent), BACKWARD)


def taken(part: FlexTensors, step: Step) -> Tensor:
    """What one forward and its backward have seen; int64 [n, 4]."""
    found = [step.own.pop(key) for key in (FORWARD, BACKWARD) if key in step.own]
    rows = torch.cat(found).to(torch.int64)
    if len(rows) < len(part.names):  # a backward without tensors of its own
        rows = torch.nn.functional.pad(rows, (0, 0, 0, len(part.names) - len(rows)))
    rows[:, ELEMENTS] = torch.tensor(part.elements, dtype=torch.int64, device=rows.device)
    for row, statistics in step.own.pop(WEIGHTS, {}).items():
        # The graph has seen what was rounded already: what saturated shows here only.
        rows[row, AMAX] = torch.maximum(rows[row, AMAX], statistics[AMAX])
        rows[row, SATURATED : NANS + 1] += statistics[SATURATED : NANS + 1]
    return rows


def merged(one: Tensor, other: Tensor) -> Tensor:
    """Statistics of two batches together."""
    total = one + other
    total[..., AMAX] = torch.maximum(one[..., AMAX], other[..., AMAX])
    return total


def over_ranks(
    ranks: Ranks, own: Mapping[str, Tensor], steps: int, known: Callable[[], int]
) -> dict[str, Tensor]:
    """Statistics of all ranks together, in one message; equal on all of them.

    Args:
        ranks: all of them.
        own: statistics of this rank.
        steps: number of this step, which has to be the same on all.
        known: gives a checksum of what new exponents are made of beside the statistics, which has
            to be the same, too. On a GPU it is compared every few steps, as this stops its stream.

    Raises:
        RankError: a rank does not answer, has other tensors or exponents, or is in another step.
    """
    looks = ranks.device.type == "cpu" or steps % LOOKS == 1
    shapes = "\n".join(f"{key} {list(rows.shape)}" for key, rows in own.items())
    ranks.agree("flex tensors", shapes, lambda: "")
    mark = torch.tensor([[steps, known() if looks else 0, 0, 0]]).to(ranks.device)
    mine = torch.cat([mark, *own.values()])
    everything = [torch.empty_like(mine) for _ in range(ranks.size)]
    with ranks.group.waiting("the exponents of flex tensors were not agreed on"):
        ranks.group.inner.allgather([everything], [mine]).wait()
    if looks:
        _compare(ranks, [rows[0, :2].tolist() for rows in everything])
    total = everything[0][1:]
    for theirs in everything[1:]:
        total = merged(total, theirs[1:])
    parts = torch.split(total, [len(rows) for rows in own.values()])
    return dict(zip(own, parts, strict=True))


def _compare(ranks: Ranks, marks: list[list[int]]) -> None:
    """Whether all ranks have the same marks: number of the step, and checksum.

    Raises:
        RankError: they have not; the same on all ranks.
    """
    most = max(marks, key=marks.count)
    same = [r for r, mark in enumerate(marks) if mark == most]
    others = [r for r, mark in enumerate(marks) if mark != most]
    if not others:
        return
    named = ranks.group.agreement.named
    steps = sorted({step for step, _ in marks})
    if len(steps) == 1:
        verb = "have" if len(others) > 1 else "has"
        text = f"the exponents of flex tensors differ: {named(others)} {verb} others than "
        text += named(same)
        hint = "load the state on every rank or on none"
    else:
        where = ((s, [r for r, mark in enumerate(marks) if mark[0] == s]) for s in steps)
        told = (f"{named(r)} {'are' if len(r) > 1 else 'is'} in step {s}" for s, r in where)
        text = f"exponents of different steps were put together: {', '.join(told)}"
        hint = "make as many steps on every rank"
    ranks.group.leave_note(text)
    raise RankError(text, hint=f"{hint}; the gradients of this step are not usable")
