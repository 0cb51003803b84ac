"""A problem in numbers: what cannot be separated is one atom, sets of atoms are bit masks."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from graphopt.partitioning.evaluate import reduction_seconds
from graphopt.partitioning.problem import Problem


@dataclass(frozen=True)
class Flow:
    """A value between atoms.

    Attributes:
        maker: an atom; -1 for an input of the model.
        readers: mask of the other atoms that read it.
        bytes: forward.
        gradient: bytes back.
        final: whether it has to reach the last stage.
    """

    maker: int
    readers: int
    bytes: int
    gradient: int
    final: bool


@dataclass(frozen=True)
class Item:
    """Something a stage has once if it has any of its users.

    Attributes:
        users: mask of atoms.
        weight: bytes, or seconds.
    """

    users: int
    weight: float


@dataclass(frozen=True)
class Atoms:
    """Atoms in a topological order.

    Attributes:
        members: positions of their operators in the problem.
        before: mask of direct predecessors of each atom.
        forward: seconds of each.
        backward: seconds of each, without reductions.
        flows: values between them.
        saved: activations, in bytes.
        trained: trained parameters, in bytes.
        fixed: other parameters, in bytes.
        reduced: seconds per step of adding up the gradient of a shared parameter, in every stage
            that has some but not all of its users.
    """

    members: tuple[tuple[int, ...], ...]
    before: tuple[int, ...]
    forward: tuple[float, ...]
    backward: tuple[float, ...]
    flows: tuple[Flow, ...]
    saved: tuple[Item, ...]
    trained: tuple[Item, ...]
    fixed: tuple[Item, ...]
    reduced: tuple[Item, ...]

    def __len__(self) -> int:
        return len(self.members)

    @property
    def everything(self) -> int:
        """The mask of all atoms."""
        return (1 << len(self.members)) - 1

    def after(self) -> tuple[int, ...]:
        """Mask of direct successors of each atom."""
        result = [0] * len(self)
        for atom, mask in enumerate(self.before):
            for other in bits(mask):
                result[other] |= 1 << atom
        return tuple(result)

    def assignment(self, bounds: Sequence[int]) -> list[int]:
        """The stage of each operator if `bounds` are the growing sets after each stage."""
        result = [0] * sum(len(m) for m in self.members)
        for atom, members in enumerate(self.members):
            stage = next(s for s, mask in enumerate(bounds) if mask >> atom & 1)
            for operator in members:
                result[operator] = stage
        return result


def bits(mask: int) -> Iterator[int]:
    """Positions of the ones of a mask, ascending."""
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low


def atoms_of(
    problem: Problem,
    *,
    together: Iterable[Iterable[int]] = (),
    edges: Iterable[tuple[int, int]] = (),
) -> Atoms:
    """The finest atoms that respect what must be together.

    Operators between two that must be together join them, since stages only feed later ones. This
    loses no partition.

    Args:
        problem: what is cut.
        together: further sets of operators to keep together, by position.
        edges: further pairs (first, second): the stage of the second is not an earlier one.
    """
    position = problem.position
    groups = [[position[name] for name in group] for group in problem.together]
    groups += [list(group) for group in together]
    flows = [
        (position[v.maker], position[reader])
        for v in problem.values
        if v.maker
        for reader in v.readers
    ]
    ordered = [*flows, *edges]
    members, before = _condensed(len(problem.operators), ordered, groups)
    atom = [0] * len(problem.operators)
    for index, own in enumerate(members):
        for operator in own:
            atom[operator] = index
    users = _users(problem, atom)
    trained = [(users[p.name], p) for p in problem.parameters if p.trained]
    return Atoms(
        members=members,
        before=before,
        forward=tuple(math.fsum(problem.operators[o].forward for o in own) for own in members),
        backward=tuple(math.fsum(problem.operators[o].backward for o in own) for own in members),
        flows=_flows(problem, position, atom),
        saved=_saved(problem, position, atom),
        trained=tuple(Item(mask, p.bytes) for mask, p in trained if mask),
        fixed=tuple(
            Item(users[p.name], p.bytes)
            for p in problem.parameters
            if not p.trained and users[p.name]
        ),
        reduced=tuple(
            Item(mask, reduction_seconds(problem, p.bytes))
            for mask, p in trained
            if mask.bit_count() > 1
        ),
    )


def _condensed(
    count: int, ordered: Sequence[tuple[int, int]], groups: Sequence[Sequence[int]]
) -> tuple[tuple[tuple[int, ...], ...], tuple[int, ...]]:
    """Strongly connected components and their direct predecessors, in topological order."""
    import numpy as np
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    bound = [(a, b) for g in groups for a, b in zip(g, [*g[1:], g[0]], strict=True)]
    pairs = np.array([*ordered, *bound], dtype=np.int64).reshape(-1, 2)
    ones = np.ones(len(pairs), dtype=np.int8)
    matrix = coo_matrix((ones, (pairs[:, 0], pairs[:, 1])), shape=(count, count))
    _, labels = connected_components(matrix.tocsr(), connection="strong")
    own: dict[int, list[int]] = {}
    for operator, label in enumerate(labels.tolist()):
        own.setdefault(label, []).append(operator)
    before: dict[int, set[int]] = {label: set() for label in own}
    after: dict[int, set[int]] = {label: set() for label in own}
    for a, b in ordered:
        first, second = int(labels[a]), int(labels[b])
        if first != second:
            before[second].add(first)
            after[first].add(second)
    waiting = {label: len(before[label]) for label in own}
    ready = [(own[label][0], label) for label in own if not waiting[label]]
    heapq.heapify(ready)
    place: dict[int, int] = {}
    while ready:
        _, label = heapq.heappop(ready)
        place[label] = len(place)
        for follower in after[label]:
            waiting[follower] -= 1
            if not waiting[follower]:
                heapq.heappush(ready, (own[follower][0], follower))
    order = sorted(own, key=place.__getitem__)
    masks = tuple(sum(1 << place[b] for b in before[label]) for label in order)
    return tuple(tuple(own[label]) for label in order), masks


def _flows(problem: Problem, position: dict[str, int], atom: Sequence[int]) -> tuple[Flow, ...]:
    result = []
    for v in problem.values:
        maker = atom[position[v.maker]] if v.maker else -1
        readers = _mask(atom[position[r]] for r in v.readers) & ~(1 << maker if v.maker else 0)
        if readers or v.final:
            result.append(Flow(maker, readers, v.bytes, v.gradient, v.final))
    return tuple(result)


def _saved(problem: Problem, position: dict[str, int], atom: Sequence[int]) -> tuple[Item, ...]:
    items: dict[int, float] = {}
    for o in problem.operators:
        if o.saved:
            mask = 1 << atom[position[o.name]]
            items[mask] = items.get(mask, 0) + o.saved
    for v in problem.values:
        mask = _mask(atom[position[name]] for name in v.saved_by)
        if mask and v.bytes:
            items[mask] = items.get(mask, 0) + v.bytes
    return tuple(Item(mask, weight) for mask, weight in items.items())


def _users(problem: Problem, atom: Sequence[int]) -> dict[str, int]:
    users = {p.name: 0 for p in problem.parameters}
    for index, o in enumerate(problem.operators):
        for name in o.parameters:
            users[name] |= 1 << atom[index]
    return users


def _mask(atoms: Iterable[int]) -> int:
    mask = 0
    for atom in atoms:
        mask |= 1 << atom
    return mask
