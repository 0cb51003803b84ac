"""The earliest finish of groups of gradients on one channel, and the fewest groups near it.

Groups of one kind are contiguous in ready order. For a given partition, no order on the channel
beats that of the ready times, so the state of the dynamic programme is how many gradients of each
kind the channel has carried, and its value is the time at which the channel becomes free. It is
exact for any cost that does not decrease with the size, and for several kinds at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from graphopt.errors import ArgumentError
from graphopt.network.curve import Curve, of_group

Floats = npt.NDArray[np.float64]

# Above these the input is made coarser by pairing neighbours: one kind costs a matrix of
# gradients squared, several kinds a number of steps that is about their product times the largest.
MOST_GRADIENTS = 2000
MOST_STEPS = 150_000_000


@dataclass(frozen=True)
class Atom:
    """Neighbours of one kind that are never separated: usually one gradient.

    Attributes:
        members: positions in ready order.
        bytes: their size together.
        seconds: when the last of them is ready.
        kind: index of their kind.
    """

    members: tuple[int, ...]
    bytes: int
    seconds: float
    kind: int


def evaluate(cost: Callable[[float], float], sizes: Floats) -> Floats:
    """`cost` of every size, bit-equal to calling it; curves without a Python loop.

    Raises:
        ArgumentError: a cost is negative, not a number, or smaller than that of a smaller message.
    """
    if isinstance(cost, Curve):
        points: Floats = np.array(cost.points, dtype=np.float64)
        x, y = points[:, 0], points[:, 1]
        if len(x) == 1:
            return np.full(sizes.shape, float(y[0]))
        right = np.searchsorted(x, sizes, side="right")
        left = np.clip(right - 1, 0, len(x) - 2)
        slope = (y[1:] - y[:-1]) / (x[1:] - x[:-1])
        costs: Floats = np.where(right == 0, y[0], y[left] + slope[left] * (sizes - x[left]))
        return costs
    distinct, places = np.unique(sizes, return_inverse=True)
    called: Floats = np.array([cost(size) for size in distinct.tolist()], dtype=np.float64)
    if not (np.all(np.diff(called) >= 0) and np.all(called >= 0)):
        raise ArgumentError(
            "the cost of a message must be a number of seconds that never falls with its size",
            where="cost",
            hint="fit measured times with graphopt.network.curve.fit",
        )
    result: Floats = called[places.reshape(sizes.shape)]
    return result


class GroupSearch:
    """Plans for gradients in ready order, given as ``(bytes, seconds, kind)``."""

    def __init__(
        self, gradients: Sequence[tuple[int, float, str]], cost: Callable[[float], float]
    ) -> None:
        names = list(dict.fromkeys(kind for _, _, kind in gradients))
        self.gradients = gradients
        self.cost = cost
        self.atoms = _coarse(
            [Atom((i,), b, s, names.index(k)) for i, (b, s, k) in enumerate(gradients)], len(names)
        )
        self.kinds = len(names)
        self.sums = [
            np.cumsum([0.0, *(a.bytes for a in self.atoms if a.kind == kind)])
            for kind in range(self.kinds)
        ]
        self.members = [
            np.cumsum([0, *(len(a.members) for a in self.atoms if a.kind == kind)])
            for kind in range(self.kinds)
        ]
        self.joining: float = getattr(cost, "joining", 0.0)
        # free[c1, c2, …]: the earliest time at which the channel has carried the first c1
        # gradients of the first kind, c2 of the second, … and is free again.
        self.free = self._fill()
        self.finish = float(self.free.flat[-1])

    def _fill(self) -> Floats:
        free = np.full([len(s) for s in self.sums], np.inf)
        free[(0,) * self.kinds] = 0.0
        seen = [0] * self.kinds
        for atom in self.atoms:
            # All states in which this atom is the last one to be ready, hence the end of the last
            # group. Of the other kinds at most what was ready before has been carried.
            seen[atom.kind] += 1
            kind, end = atom.kind, seen[atom.kind]
            states = np.moveaxis(free[tuple(slice(n + 1) for n in seen)], kind, 0)
            costs = self._costs(kind, end).reshape(-1, *[1] * (self.kinds - 1))
            states[end] = (np.maximum(states[:end], atom.seconds) + costs).min(axis=0)
        return free

    def _costs(self, kind: int, end: int) -> Floats:
        """Costs of the groups of `kind` that end before `end`, by their start."""
        return self._group_costs(kind, slice(end), end)

    def _group_costs(self, kind: int, start: Any, end: Any) -> Floats:
        """Costs of the groups of `kind` from `start` to before `end`, laid out and sent."""
        sizes = self.sums[kind][end] - self.sums[kind][start]
        costs = evaluate(self.cost, sizes)
        if self.joining:
            several = self.members[kind][end] - self.members[kind][start] > 1
            costs = costs + np.where(several, self.joining * sizes, 0.0)
        return costs

    def optimal(self) -> list[tuple[int, ...]]:
        """The members of each group of a plan with the earliest finish."""
        own = [[a for a in self.atoms if a.kind == kind] for kind in range(self.kinds)]
        place = {a: i for i, a in enumerate(self.atoms)}
        state, groups = [len(atoms) for atoms in own], []
        while any(state):
            last = {k: own[k][n - 1] for k, n in enumerate(state) if n}
            kind = max(last, key=lambda k: place[last[k]])
            end = state[kind]
            before = self.free[tuple(slice(n) if k == kind else n for k, n in enumerate(state))]
            after = np.maximum(before, last[kind].seconds) + self._costs(kind, end)
            state[kind] = int(after.argmin())  # the first: the largest of equally good groups
            groups.append(_members(own[kind][state[kind] : end]))
        return groups[::-1]

    def fewest(self, target: float) -> list[tuple[int, ...]]:
        """The members of the fewest groups that finish by `target` seconds; of those the earliest.

        Exact for one kind. For several, groups of the optimal plan are joined while that keeps
        to `target`, the last ones first.
        """
        return self._layers(target) if self.kinds == 1 else self._joined(target)

    def _layers(self, target: float) -> list[tuple[int, ...]]:
        """Earliest finish of every prefix by number of groups, without states that cannot win."""
        n = len(self.atoms)
        ready = np.array([0.0, *(a.seconds for a in self.atoms)])
        costs = np.full((n + 1, n + 1), np.inf)
        start_, end_ = np.triu_indices(n + 1, 1)
        costs[start_, end_] = self._group_costs(0, start_, end_)
        # The latest time at which the channel may have carried a prefix. Sums round
        # differently here, hence the margin; keeping a useless state only costs time.
        latest = np.full(n + 1, -np.inf)
        latest[n] = target
        for start in range(n - 1, -1, -1):
            begin = latest[start + 1 :] - costs[start, start + 1 :]
            fits = begin >= ready[start + 1 :] - 1e-9 * abs(target)
            latest[start] = np.where(fits, begin, -np.inf).max()
        latest += 1e-9 * abs(target)
        layers = [np.array([0.0] + [np.inf] * n)]
        best = layers[0]
        while layers[-1][n] > target:
            alive = np.flatnonzero(np.isfinite(layers[-1]))
            ends = np.maximum(layers[-1][alive, None], ready) + costs[alive]
            layer = ends.min(axis=0)
            # With more groups and no earlier: never better than the prefix it repeats.
            layers.append(np.where((layer < best) & (layer <= latest), layer, np.inf))
            best = np.minimum(best, layer)
        groups, end = [], n
        for layer in reversed(layers[:-1]):
            start = int((np.maximum(layer, ready[end]) + costs[:, end]).argmin())
            groups.append(_members(self.atoms[start:end]))
            end = start
        return groups[::-1]

    def _joined(self, target: float) -> list[tuple[int, ...]]:
        groups = self.optimal()
        for kind in dict.fromkeys(kind for _, _, kind in self.gradients):
            chain = [g for g in groups if self.gradients[g[0]][2] == kind]
            for left, right in reversed(list(pairwise(chain))):
                tail = next(
                    g for g in groups if right[-1] in g
                )  # `right` and what was joined to it
                trial = [g for g in groups if g not in (left, tail)] + [left + tail]
                trial.sort(key=max)
                if self._finish(trial) <= target:
                    groups = trial
        return groups

    def _finish(self, groups: Sequence[tuple[int, ...]]) -> float:
        clock = 0.0
        for group in groups:
            ready = max(self.gradients[m][1] for m in group)
            size = sum(self.gradients[m][0] for m in group)
            clock = max(clock, ready) + of_group(self.cost, size, len(group))
        return clock


def _members(atoms: Sequence[Atom]) -> tuple[int, ...]:
    return tuple(m for atom in atoms for m in atom.members)


def _steps(atoms: Sequence[Atom], kinds: int) -> int:
    """Number of comparisons that `GroupSearch` makes."""
    seen, steps = [0] * kinds, 0
    for atom in atoms:
        seen[atom.kind] += 1
        states = seen[atom.kind]
        for kind, n in enumerate(seen):
            states *= 1 if kind == atom.kind else n + 1
        steps += states
    return steps


def _coarse(atoms: list[Atom], kinds: int) -> list[Atom]:
    """`atoms`, or pairs of neighbours of the most frequent kind until the search is affordable."""
    while True:
        count = [sum(a.kind == kind for a in atoms) for kind in range(kinds)]
        small = max(count, default=0) <= MOST_GRADIENTS and _steps(atoms, kinds) <= MOST_STEPS
        if small or max(count) == 1:
            return atoms
        longest = count.index(max(count))
        own = [a for a in atoms if a.kind == longest]
        pairs = [
            Atom(_members(p), sum(a.bytes for a in p), p[-1].seconds, longest)
            for p in (own[i : i + 2] for i in range(0, len(own), 2))
        ]
        rest = [a for a in atoms if a.kind != longest]
        atoms = sorted(rest + pairs, key=lambda a: (a.seconds, a.members[-1]))
