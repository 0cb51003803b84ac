"""Ranks that are in different steps, or scale their losses differently: who is where."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from graphopt.errors import RankError
from graphopt.runtime.ranks.notes import GRACE
from graphopt.runtime.ranks.ranks import Ranks
from graphopt.runtime.ranks.store import StoreLost


def slipped(ranks: Ranks, passes: int, scale: float) -> RankError:
    """Which ranks are in which backward pass, as far as they say; called on all that find it out.

    Args:
        ranks: all of them.
        passes: number of the pass in which this rank is.
        scale: what its loss was multiplied with.
    """
    agreement = ranks.group.agreement
    mine = f"{passes} {scale!r}"
    try:
        said = agreement.gathered("slipped", mine, GRACE)
    except StoreLost:
        said = {agreement.rank: mine}  # what this rank knows is worth an error
    numbers = {rank: text.split() for rank, text in said.items()}
    if len({number for number, _ in numbers.values()}) == 1 < len(set(said.values())):
        text = f"gradients of losses with different scales were added up: {_told(ranks, numbers)}"
        error = RankError(
            text,
            hint="load the state of the scaler, or graphopt.load_state_dict, on every rank or on "
            "none, and call scaler.update() on all; the gradients of this step are not usable",
        )
    else:
        text = f"gradients of different steps were added up: {_told(ranks, numbers)}"
        error = RankError(
            text,
            hint="make as many backward passes on every rank, with no_sync() around the same ones; "
            "the gradients of this step are not usable",
        )
    ranks.group.leave_note(text)
    return error


def _told(ranks: Ranks, numbers: Mapping[int, Sequence[str]]) -> str:
    """The ranks by pass, or by loss scale where that is what differs."""
    passes = {number for number, _ in numbers.values()}
    scaled = len(passes) == 1 < len({scale for _, scale in numbers.values()})
    where: dict[str, list[int]] = {}
    for rank, (number, scale) in sorted(numbers.items()):
        where.setdefault(scale if scaled else number, []).append(rank)
    parts = []
    for value, members in where.items():
        several = len(members) > 1
        what = f"{'are' if several else 'is'} in backward pass {value}"
        if scaled:
            what = f"{'have' if several else 'has'} {float(value):g}"
        parts.append(f"{ranks.group.agreement.named(members)} {what}")
    if len(parts) == 1:
        parts.append("another rank is in another one")
    return ", ".join(parts)
