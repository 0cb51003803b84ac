"""In which order to compute, so that gradients are ready early and little is left for the end.

Computation and channel form a two-machine flow shop: each gradient is computed on the first and
then sent on the second. Johnson's rule (1954) orders free tasks so that the last one is sent as
early as possible. Here the tasks hang off a chain and form an out-tree, for which the rule stays
exact if the best task is repeatedly merged into the one that it waits for (Sidney 1979). That holds
as long as a message costs nothing but its bytes; the cost of starting messages enters when the
candidates are compared with their real groups.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from graphopt.plan.grouping import Ready

Cost = Callable[[float], float]
Order = tuple[int, ...]


@dataclass(frozen=True)
class Task:
    """Something to compute in one piece.

    Attributes:
        seconds: how long it takes.
        after: index of the task that has to be done before; -1 for none. It is always a smaller
            index, so the order of indices is a legal one.
        releases: gradients that are ready once it is done; their times are not used.
    """

    seconds: float
    after: int = -1
    releases: tuple[Ready, ...] = ()

    @property
    def bytes(self) -> int:
        """Bytes to send once it is done."""
        return sum(ready.bytes for ready in self.releases)


def ready_times(tasks: Sequence[Task], order: Sequence[int]) -> tuple[Ready, ...]:
    """The gradients with their ready times, in that order."""
    result, clock = [], 0.0
    for index in order:
        clock += tasks[index].seconds
        result += [replace(ready, seconds=clock) for ready in tasks[index].releases]
    return tuple(result)


def lower_bound(ready: Sequence[Ready], cost: Cost) -> float:
    """Earliest time at which everything can be sent, if merging messages is free."""
    left, latest = 0, 0.0
    for item in reversed(ready):
        left += item.bytes
        latest = max(latest, item.seconds + cost(left))
    return latest


def candidates(tasks: Sequence[Task], cost: Cost) -> dict[str, Order]:
    """Orders worth comparing, all of them legal; equal ones are listed once."""
    total = sum(task.bytes for task in tasks)
    rate = (cost(total) - cost(0)) / total if total else 0.0
    jobs = _leaves(tasks)
    found = {"johnson": johnson(tasks, rate), "johnson half rate": johnson(tasks, rate / 2)}
    found["chain first"] = _late(tasks, rate, frozenset(jobs))
    sizes = sorted({tasks[index].bytes for index in jobs})
    for part in (1, 2, 3):
        limit = sizes[len(sizes) * part // 4] if sizes else 0
        small = frozenset(index for index in jobs if tasks[index].bytes < limit)
        found[f"large first, from {limit} B"] = _late(tasks, rate, small)
    unique = {order: name for name, order in reversed(found.items())}
    return {name: order for name, order in found.items() if unique[order] == name}


def best_first(
    tasks: Sequence[Task], cost: Cost, finish: Callable[[Sequence[Ready]], float], limit: int = 4
) -> list[tuple[float, str, Order]]:
    """The most promising candidates with their predicted finish, best first.

    Args:
        tasks: what to order.
        cost: seconds of one message over its bytes.
        finish: when everything is sent, for gradients in ready order; may be slow.
        limit: for how many candidates `finish` is called, by their lower bounds.
    """
    scored = []
    for name, order in candidates(tasks, cost).items():
        ready = ready_times(tasks, order)
        scored.append((lower_bound(ready, cost), name, order, ready))
    scored.sort(key=lambda item: item[0])
    return sorted(
        ((finish(ready), name, order) for _, name, order, ready in scored[:limit]),
        key=lambda item: item[0],
    )


# -- Johnson's rule on a tree ----------------------------------------------------------------------


@dataclass
class _Block:
    """Tasks that follow each other; together they act like one task of these two times."""

    tasks: list[int]
    compute: float
    send: float

    @property
    def key(self) -> tuple[int, float]:
        """Johnson's rule: short computation first, then long sending first."""
        if self.compute < self.send:
            return (0, self.compute)
        return (1, -self.send)

    def append(self, other: _Block) -> None:
        # While the other is computed, this one is sent: the shorter of both is hidden.
        hidden = min(self.send, other.compute)
        self.tasks += other.tasks
        self.compute += other.compute - hidden
        self.send += other.send - hidden


def johnson(tasks: Sequence[Task], rate: float) -> Order:
    """The order that sends everything earliest if a message takes `rate` seconds per byte."""
    root = _Block([], 0.0, 0.0)
    blocks = {i: _Block([i], task.seconds, rate * task.bytes) for i, task in enumerate(tasks)}
    blocks[-1] = root
    inside = list(range(len(tasks)))  # a task's block is that of the first task of the block
    heap = [(block.key, index) for index, block in blocks.items() if index >= 0]
    heapq.heapify(heap)

    def first_of(index: int) -> int:
        while index >= 0 and inside[index] != index:
            index = inside[index]
        return index

    while heap:
        key, index = heapq.heappop(heap)
        if inside[index] != index or blocks[index].key != key:
            continue  # it was merged into another block, or grew since
        parent = first_of(tasks[index].after)
        blocks[parent].append(blocks[index])
        inside[index] = parent
        if parent >= 0:
            heapq.heappush(heap, (blocks[parent].key, parent))
    return tuple(root.tasks)


def _leaves(tasks: Sequence[Task]) -> tuple[int, ...]:
    """Tasks with gradients that nothing waits for."""
    needed = {task.after for task in tasks}
    return tuple(i for i, task in enumerate(tasks) if task.releases and i not in needed)


def _late(tasks: Sequence[Task], rate: float, late: frozenset[int]) -> Order:
    """Everything in its present order, each task as early as possible; `late` ones at the end."""
    followers: dict[int, list[int]] = {}
    for index, task in enumerate(tasks):
        followers.setdefault(task.after, []).append(index)
    leaves = set(_leaves(tasks))
    order: list[int] = []
    waiting = [-1]
    while waiting:
        current = waiting.pop()
        if current >= 0:
            order.append(current)
        mine = [index for index in followers.get(current, ()) if index not in late]
        order += [index for index in mine if index in leaves]
        waiting += [index for index in reversed(mine) if index not in leaves]
    rest = [_Block([i], tasks[i].seconds, rate * tasks[i].bytes) for i in sorted(late)]
    rest.sort(key=lambda block: block.key)
    return (*order, *(block.tasks[0] for block in rest))
