"""How the examples of an epoch are dealt into batches, each of one size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Examples: TypeAlias = NDArray[np.int64]


@dataclass
class Dealt:
    """One epoch.

    Attributes:
        batches: of all ranks, from the largest size to the smallest. A step is `ranks` batches in a
            row, of one shape. Each batch has an example whose own size is the batch's, so that the
            size can be told from its examples.
        sizes: of each batch, as an index.
        dropped: examples that are in no batch.
        repeated: examples that are in a batch once more.
    """

    batches: list[Examples] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    dropped: int = 0
    repeated: int = 0


def deal(groups: Sequence[Examples], batch: Sequence[int], *, ranks: int, drop_last: bool) -> Dealt:
    """Deal every example once.

    From the largest size down, what does not fill the last step of a size is filled up with
    examples of smaller ones, those of the next smaller size first. So only the step in which
    examples run out can be smaller than its size's others.

    Args:
        groups: examples by size, the smallest size first, in the order in which they are to come.
        batch: examples in a batch of that size.
        ranks: batches in a step.
        drop_last: leave out a step that is not full.
    """
    left = list(groups)
    dealt = Dealt()
    for index in reversed(range(len(groups))):
        own, left[index] = left[index], left[index][:0]
        if not len(own):
            continue
        step = ranks * batch[index]
        steps = -(-len(own) // step)
        again = max(0, steps * ranks - len(own))  # each batch has one of its own size
        others = _take(left, index, steps * step - len(own) - again)
        found = len(own) + again + len(others)
        places = [batch[index]] * (found // step * ranks)
        if rest := found % step:
            if drop_last:
                # With fewer than one for each batch there is no other step.
                dealt.dropped += rest - again
                again = 0
                kept = sum(places)
                own, others = own[:kept], others[: max(0, kept - len(own))]
            else:
                again += -rest % ranks
                places += [-(-rest // ranks)] * ranks
        dealt.repeated += again
        own = np.concatenate([own, np.resize(own, again)])
        dealt.batches += _spread(own, others, places)
        dealt.sizes += [index] * len(places)
    return dealt


def _spread(own: Examples, others: Examples, places: Sequence[int]) -> list[Examples]:
    """Batches of these sizes: in each at least one of `own`, and `others` evenly among them."""
    if not places:
        return []
    room = np.asarray(places) - 1
    before = np.concatenate([[0], np.cumsum(room)])
    spare = len(own) - len(places)
    # After b batches: one of `own` for each, and their part of the rest.
    owned = np.arange(len(places) + 1) + spare * before // max(1, int(before[-1]))
    ends = np.concatenate([[0], np.cumsum(places)])
    other = ends - owned
    return [
        np.concatenate([own[owned[b] : owned[b + 1]], others[other[b] : other[b + 1]]])
        for b in range(len(places))
    ]


def _take(left: list[Examples], below: int, wanted: int) -> Examples:
    """Take so many of the examples of smaller sizes, the largest of these first."""
    taken = [np.zeros(0, dtype=np.int64)]
    for index in reversed(range(below)):
        if wanted <= 0:
            break
        group = left[index]
        left[index], part = np.split(group, [max(0, len(group) - wanted)])
        taken.append(part)
        wanted -= len(part)
    return np.concatenate(taken)
