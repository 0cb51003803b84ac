"""The costs of all stages between two downsets, as arrays over the upper one.

The cost of a stage is a function of the downset before it and the one after it: sums over its
atoms, what crosses its two cuts, and items that it has once if it has any of their users. The last
ones are sums, too, except for items with users on both sides of the lower cut, which are few.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from graphopt.partitioning.atoms import Atoms, bits
from graphopt.partitioning.objective import Objective
from graphopt.partitioning.problem import Link

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]

SAVED, TRAINED, FIXED = range(3)


@dataclass(frozen=True)
class Row:
    """All stages that begin behind one downset; arrays are over the downsets that end them.

    Attributes:
        start: position of the downset before the stage.
        ends: positions of the downsets after it.
        forward: seconds of forward, or of a cut's transfer where that is overlapped and longer.
        backward: the same of backward.
        whole: the same of both.
        latency: seconds of compute and of the cut behind the stage.
        holds: bytes of activations, of trained and of other parameters, as rows; None where memory
            is not limited.
    """

    start: int
    ends: Integers
    forward: Floats
    backward: Floats
    whole: Floats
    latency: Floats
    holds: Floats | None


class Space:
    """Downsets of a problem with what is needed to cost the stages between them.

    Args:
        atoms: the problem in numbers.
        masks: downsets, smaller ones first, from nothing to everything.
        link: what connects stages.
        objective: what is minimised.
        limited: whether to compute what stages hold.
    """

    def __init__(
        self,
        atoms: Atoms,
        masks: Sequence[int],
        link: Link,
        objective: Objective,
        *,
        limited: bool,
    ) -> None:
        self.atoms, self.masks, self.objective = atoms, masks, objective
        self.limited = limited
        count = len(atoms)
        width = (count + 63) // 64 * 8
        raw = b"".join(mask.to_bytes(width, "little") for mask in masks)
        octets = np.frombuffer(raw, dtype=np.uint8).reshape(len(masks), width)
        self.words = octets.view(np.uint64)
        self._members = np.unpackbits(octets, axis=1, count=count, bitorder="little")
        self.forward = self._sums(atoms.forward)
        self.backward = self._sums(atoms.backward)
        self.sizes: Integers = self._members.sum(axis=1, dtype=np.int64)
        self.cut_forward, self.cut_backward = self._cuts(link)
        self.reduced = [
            (self._counts(item.users), item.users.bit_count(), item.weight)
            for item in atoms.reduced
        ]
        if limited:
            self._hold()

    def __len__(self) -> int:
        return len(self.masks)

    def contains(self, start: int, ends: Integers) -> NDArray[np.bool_]:
        """Which of the downsets `ends` contain the downset `start`."""
        found: NDArray[np.bool_] = ((self.words[start] & ~self.words[ends]) == 0).all(axis=1)
        return found

    def row(self, start: int, ends: Integers) -> Row:
        """The stages from downset `start` to each of `ends`, which contain it."""
        forward = self.forward[ends] - self.forward[start]
        backward = self.backward[ends] - self.backward[start]
        for counts, users, seconds in self.reduced:
            here, there = counts[start], counts[ends]
            partly = (there != here) & ~((here == 0) & (there == users))
            backward = backward + partly * (seconds / self.objective.micro_batches)
        out_forward, out_backward = self.cut_forward[ends], self.cut_backward[ends]
        latency = forward + backward + out_forward + out_backward
        if self.objective.overlap:
            whole = np.maximum(forward + backward, out_forward + out_backward)
            forward = np.maximum(forward, out_forward)
            backward = np.maximum(backward, out_backward)
        else:
            forward = forward + self.cut_forward[start] + out_forward
            backward = backward + self.cut_backward[start] + out_backward
            whole = forward + backward
        holds = self._holds(start, ends) if self.limited else None
        return Row(start, ends, forward, backward, whole, latency, holds)

    def _cuts(self, link: Link) -> tuple[Floats, Floats]:
        """Seconds of the transfers behind each downset, forward and backward."""
        size = np.zeros(len(self.masks))
        gradient = np.zeros(len(self.masks))
        for flow in self.atoms.flows:
            if flow.final:
                crossing = np.ones(len(self.masks), dtype=bool)
            else:
                crossing = self._counts(flow.readers) < flow.readers.bit_count()
            if flow.maker >= 0:
                crossing = crossing & (self._members[:, flow.maker] == 1)
            size += crossing * float(flow.bytes)
            gradient += crossing * float(flow.gradient)
        for sizes in (size, gradient):
            sizes[self.sizes == 0] = 0.0
            sizes[self.sizes == len(self.atoms)] = 0.0
        seconds = [
            np.where(sizes > 0, link.latency + link.seconds_per_byte * sizes, 0.0)
            for sizes in (size, gradient)
        ]
        return seconds[0], seconds[1]

    def _sums(self, weights: Sequence[float]) -> Floats:
        """The sum of the weights of the atoms in each downset."""
        sums: Floats = np.dot(self._members.astype(np.float64), np.array(weights))
        return sums

    def _counts(self, users: int) -> Integers:
        """How many of some atoms are in each downset."""
        columns = list(bits(users))
        counts: Integers = self._members[:, columns].sum(axis=1, dtype=np.int64)
        return counts

    def _hold(self) -> None:
        kinds = (self.atoms.saved, self.atoms.trained, self.atoms.fixed)
        self._touched = np.zeros((3, len(self.masks)))
        several = []
        for kind, items in enumerate(kinds):
            for item in items:
                counts = self._counts(item.users)
                self._touched[kind] += item.weight * (counts > 0)
                if item.users.bit_count() > 1:
                    several.append((counts, item.users.bit_count(), kind, item.weight))
        shape = (len(several), len(self.masks))
        self._several: Integers = np.zeros(shape, dtype=np.int64)
        self._users: Integers = np.array([s[1] for s in several], dtype=np.int64)
        self._weights = np.zeros((3, len(several)))
        for index, (counts, _, kind, weight) in enumerate(several):
            self._several[index] = counts
            self._weights[kind, index] = weight

    def _holds(self, start: int, ends: Integers) -> Floats:
        held: Floats = self._touched[:, ends] - self._touched[:, start, None]
        here = self._several[:, start]
        across = np.nonzero((here > 0) & (here < self._users))[0]
        if across.size:
            again = self._several[np.ix_(across, ends)] != here[across, None]
            held = held + self._weights[:, across] @ again
        return held
