"""Dynamic programming over downsets.

``f(j, I)`` is the best score of j stages that together hold the downset I:
``f(j + 1, J) = min over I < J of combine(f(j, I), score of the stage from I to J)``.
What a stage costs may depend on both downsets and on j, so memory limits of schedules that hold
more in earlier stages stay exact.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from graphopt.partitioning.pairs import Pairs
from graphopt.partitioning.space import FIXED, SAVED, TRAINED, Floats, Row, Space

Score = Literal["whole", "backward", "latency", "excess"]

KEPT_STAGES = 2_000_000  # stages whose costs are kept between searches
ROUNDING = 1e-12


@dataclass(frozen=True)
class Limits:
    """Seconds that no stage (and no overlapped cut) may exceed."""

    forward: float = math.inf
    backward: float = math.inf
    whole: float = math.inf


@dataclass(frozen=True)
class Chain:
    """A partition as growing downsets.

    Attributes:
        score: what was minimised.
        bounds: masks of the downsets after each stage.
        forward: the slowest forward.
        backward: the slowest backward.
        whole: the slowest stage.
        latency: seconds of all stages and cuts.
    """

    score: float
    bounds: tuple[int, ...]
    forward: float
    backward: float
    whole: float
    latency: float


class Search:
    """Finds the best partition of a space into a number of stages.

    Args:
        space: the downsets.
        stages: how many stages, none of them empty.
        limits: that all searches will respect; tight ones leave fewer stages to consider.
        obey: whether limits of memory are obeyed; where not, ``"excess"`` can be minimised.
        kept: up to how many stages are kept in memory at once.
    """

    def __init__(
        self,
        space: Space,
        stages: int,
        limits: Limits | None = None,
        *,
        obey: bool = True,
        kept: int = KEPT_STAGES,
    ) -> None:
        self.space, self.stages, self.kept = space, stages, kept
        self.limits = _rounded(limits or Limits())
        self.obey = obey and space.limited
        memory = space.objective.memory
        batches = space.objective.micro_batches
        self._flying = np.array([memory.in_flight(stages, s, batches) for s in range(stages)])
        self._copies = np.array([memory.copies(stages, s) for s in range(stages)])
        self._allowed = np.array([memory.limit_of(s) for s in range(stages)])
        self._need = _needed(space, self.limits, behind=True)
        self._pairs = self._gathered()

    def best(self, score: Score, limits: Limits | None = None) -> Chain | None:
        """The partition with the least score within limits; None where there is none."""
        limits = _rounded(limits or self.limits)
        if self._pairs is None:
            found = self._by_rows(score, limits)
        elif self._pairs:
            found = self._by_layers(self._pairs, score, limits)
        else:
            found = None
        return None if found is None else self._chain(*found)

    def _by_layers(
        self, pairs: Pairs, score: Score, limits: Limits
    ) -> tuple[float, list[int]] | None:
        outside = (pairs.forward > limits.forward) | (pairs.backward > limits.backward)
        outside |= pairs.whole > limits.whole
        stages = np.arange(self.stages)
        everything = slice(None)

        def scored(stage: int) -> Floats:
            result: Floats = self._scored(pairs, everything, score, stages[stage : stage + 1])[0]
            result[outside] = np.inf
            return result

        return pairs.layers(self.stages, len(self.space), scored, add=score == "latency")

    def _by_rows(self, score: Score, limits: Limits) -> tuple[float, list[int]] | None:
        last = len(self.space) - 1
        f = np.full((self.stages + 1, last + 1), np.inf)
        parent = np.full((self.stages + 1, last + 1), -1, dtype=np.int32)
        f[0, 0] = 0.0 if score == "latency" else -np.inf
        for row in self._rows():
            reached = np.nonzero(f[: self.stages, row.start] < np.inf)[0]
            if not reached.size:
                continue
            fits = row.whole <= limits.whole
            fits &= (row.forward <= limits.forward) & (row.backward <= limits.backward)
            kept = np.nonzero(fits)[0]
            if not kept.size:
                continue
            ends = row.ends[kept]
            gain = self._scored(row, kept, score, reached)
            so_far = f[reached, row.start][:, None]
            value = so_far + gain if score == "latency" else np.maximum(so_far, gain)
            value[(self.stages - 1 - reached)[:, None] < self._need[ends]] = np.inf
            target = np.ix_(reached + 1, ends)
            better = value < f[target]
            f[target] = np.where(better, value, f[target])
            parent[target] = np.where(better, row.start, parent[target])
        if not f[self.stages, last] < np.inf:
            return None
        chain = [last]
        for j in range(self.stages, 0, -1):
            chain.append(int(parent[j, chain[-1]]))
        return float(f[self.stages, last]), chain[::-1]

    def _chain(self, score: float, chain: list[int]) -> Chain:
        space = self.space
        steps = itertools.pairwise(chain)
        rows = [space.row(i, np.array([j])) for i, j in steps]
        return Chain(
            score,
            tuple(space.masks[j] for j in chain[1:]),
            forward=max(float(r.forward[0]) for r in rows),
            backward=max(float(r.backward[0]) for r in rows),
            whole=max(float(r.whole[0]) for r in rows),
            latency=math.fsum(float(r.latency[0]) for r in rows),
        )

    def _scored(
        self,
        row: Row | Pairs,
        kept: NDArray[np.int64] | slice,
        score: Score,
        reached: NDArray[np.int64],
    ) -> Floats:
        """Scores by stage number and end; infinite where a stage does not fit into memory."""
        if row.holds is None or not (self.obey or score == "excess"):
            return np.repeat(_seconds(row, score)[kept][None, :], reached.size, axis=0)
        saved, trained, fixed = (row.holds[kind][kept] for kind in (SAVED, TRAINED, FIXED))
        held = self._flying[reached, None] * saved + self._copies[reached, None] * trained + fixed
        excess: Floats = held - self._allowed[reached, None]
        if score == "excess":
            return excess
        # Sizes are whole numbers, so that half a byte is rounding.
        return np.where(excess <= 0.5, _seconds(row, score)[kept], np.inf)

    # -- which stages there are --------------------------------------------------------------------

    def _gathered(self) -> Pairs | Literal[False] | None:
        """All stages, if they are few enough to be kept; False if there is none."""
        rows: list[Row] = []
        count = 0
        for row in self._rows():
            rows.append(row)
            count += row.ends.size
            if count > self.kept:
                return None
        return Pairs(rows) if rows else False

    def _rows(self) -> Iterator[Row]:
        space, limits = self.space, self.limits
        before = _needed(space, limits, behind=False)
        alive = np.nonzero(before + self._need <= self.stages)[0]
        whole = space.forward + space.backward
        for position, start in enumerate(alive.tolist()):
            ends = alive[position + 1 :]
            ends = ends[
                (whole[ends] - whole[start] <= limits.whole)
                & (space.forward[ends] - space.forward[start] <= limits.forward)
                & (space.backward[ends] - space.backward[start] <= limits.backward)
            ]
            ends = ends[space.sizes[ends] > space.sizes[start]]
            ends = ends[space.contains(start, ends)]
            if not ends.size:
                continue
            row = space.row(start, ends)
            fits = np.nonzero(
                (row.whole <= limits.whole)
                & (row.forward <= limits.forward)
                & (row.backward <= limits.backward)
            )[0]
            if fits.size:
                yield _picked(row, fits)


def _needed(space: Space, limits: Limits, *, behind: bool) -> NDArray[np.int64]:
    """Stages that what is in (or behind) each downset takes at least."""
    need = np.zeros(len(space), dtype=np.int64)
    forward, backward = space.forward, space.backward
    pairs = [(forward, limits.forward), (backward, limits.backward)]
    pairs.append((forward + backward, limits.whole))
    cuts = [space.cut_forward, space.cut_backward, space.cut_forward + space.cut_backward]
    for (load, limit), cut in zip(pairs, cuts, strict=True):
        left = load[-1] - load if behind else load
        if not space.objective.overlap:
            left = left + cut  # one of these stages waits for it
        if 0 < limit < math.inf:
            need = np.maximum(need, np.ceil(left / limit - 1e-9).astype(np.int64))
    occupied = space.sizes < space.sizes[-1] if behind else space.sizes > 0
    return np.maximum(need, occupied.astype(np.int64))


def _seconds(stages: Row | Pairs, score: Score) -> Floats:
    if score == "latency":
        return stages.latency
    return stages.backward if score == "backward" else stages.whole


def _picked(row: Row, fits: NDArray[np.int64]) -> Row:
    return replace(
        row,
        ends=row.ends[fits],
        forward=row.forward[fits],
        backward=row.backward[fits],
        whole=row.whole[fits],
        latency=row.latency[fits],
        holds=None if row.holds is None else row.holds[:, fits],
    )


def _rounded(limits: Limits) -> Limits:
    """The same limits with room for rounding."""
    room = 1 + ROUNDING
    return Limits(limits.forward * room, limits.backward * room, limits.whole * room)
