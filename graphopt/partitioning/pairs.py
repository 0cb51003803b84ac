"""All stages of a space in flat arrays, so that a layer of the recursion is a few array operations.

Only for as many stages as fit into memory; larger spaces go row by row
(`graphopt.partitioning.dynamic`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from graphopt.partitioning.space import Floats, Row


class Pairs:
    """Stages by the downset that ends them.

    Attributes:
        start: position of the downset before each stage.
        forward: as in `Row`, like the others.
        backward: as in `Row`.
        whole: as in `Row`.
        latency: as in `Row`.
        holds: as in `Row`.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        start = np.concatenate([np.full(row.ends.size, row.start) for row in rows])
        end = np.concatenate([row.ends for row in rows])
        order = np.argsort(end, kind="stable")
        self.start: NDArray[np.int64] = start[order]
        self.forward: Floats = np.concatenate([row.forward for row in rows])[order]
        self.backward: Floats = np.concatenate([row.backward for row in rows])[order]
        self.whole: Floats = np.concatenate([row.whole for row in rows])[order]
        self.latency: Floats = np.concatenate([row.latency for row in rows])[order]
        held = [row.holds for row in rows if row.holds is not None]
        self.holds: Floats | None = np.concatenate(held, axis=1)[:, order] if held else None
        self._ends, self._first = np.unique(end[order], return_index=True)
        self._size = end.size

    def layers(
        self, stages: int, count: int, score: Callable[[int], Floats], *, add: bool
    ) -> tuple[float, list[int]] | None:
        """The best score and its chain of positions from nothing to everything.

        Args:
            stages: how many.
            count: how many downsets.
            score: of each stage that stands at a place of the pipeline; infinite where impossible.
            add: whether scores add up; else the largest counts.
        """
        f = np.full((stages + 1, count), np.inf)
        f[0, 0] = 0.0 if add else -np.inf
        for j in range(stages):
            value = self._combined(f[j], score(j), add)
            f[j + 1, self._ends] = np.minimum.reduceat(value, self._first)
        best = float(f[stages, count - 1])
        if not best < np.inf:
            return None
        chain = [count - 1]
        for j in reversed(range(stages)):
            value = self._combined(f[j], score(j), add)
            place = int(np.searchsorted(self._ends, chain[-1]))
            first = int(self._first[place])
            last = int(self._first[place + 1]) if place + 1 < self._first.size else self._size
            chain.append(int(self.start[first + int(np.argmin(value[first:last]))]))
        return best, chain[::-1]

    def _combined(self, before: Floats, score: Floats, add: bool) -> Floats:
        so_far: Floats = before[self.start]
        return so_far + score if add else np.maximum(so_far, score)
