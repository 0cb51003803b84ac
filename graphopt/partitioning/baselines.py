"""How others cut: heuristics over one sequence of operators, to be held against the optimum.

They cut the order in which the model runs. Each is written from its published description, and
gets the same costs as the exact search.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from graphopt.partitioning.atoms import Atoms, atoms_of, bits
from graphopt.partitioning.evaluate import evaluate
from graphopt.partitioning.objective import Objective
from graphopt.partitioning.problem import Link, Problem
from graphopt.partitioning.result import Partition

MOVES = 4  # per element and block, against going round in circles


def baselines(problem: Problem, stages: int, objective: Objective) -> dict[str, Partition]:
    """Partitions by name; they ignore limits of memory.

    ``"torchgpipe"`` balances the times of blocks, ``"equal parameters"`` their parameters,
    ``"equal layers"`` the number of layers with parameters; ``"pipedream"`` minimises the slowest
    of computation and transfer of the last output before the cut.
    """
    atoms = atoms_of(problem)
    seconds = [f + b for f, b in zip(atoms.forward, atoms.backward, strict=True)]
    sizes = [0.0] * len(atoms)
    for item in (*atoms.trained, *atoms.fixed):
        sizes[next(bits(item.users))] += item.weight
    layers = [float(any(problem.operators[o].layer for o in members)) for members in atoms.members]
    found = {
        "torchgpipe": blocks(seconds, stages),
        "equal parameters": _balanced(sizes, stages),
        "equal layers": _balanced(layers, stages),
        "pipedream": _pipedream(atoms, seconds, stages, problem.link),
    }
    return {
        name: evaluate(problem, _assignment(atoms, lengths), objective, method=name)
        for name, lengths in found.items()
    }


def blocks(costs: Sequence[float], count: int) -> list[int]:
    """Lengths of `count` blocks whose sums differ by at most the largest element, as torchgpipe.

    The algorithm of Bárány and Grinberg, "Block partitions of sequences": as long as the largest
    block exceeds the smallest by more than one largest element, an element moves from the largest
    block through its neighbours towards the nearest block that is smaller by more than that.
    """
    low, high = min(costs), max(costs)
    unit = [(c - low) / (high - low) if high > low else 1.0 for c in costs]
    length = [len(costs) // count + (b < len(costs) % count) for b in range(count)]
    for _ in range(MOVES * len(costs) * count):
        edges = _edges(length)
        sums = [math.fsum(unit[a:b]) for a, b in edges]
        largest = max(range(count), key=sums.__getitem__)
        smaller = [b for b in range(count) if sums[b] < sums[largest] - 1]
        if not smaller:
            break
        target = min(smaller, key=lambda b: (abs(b - largest), sums[b]))
        step = 1 if target > largest else -1
        block = largest
        # Hand an element on until a block takes it without becoming as large as the largest.
        while block != target:
            first, last = _edges(length)[block]
            moved = unit[last - 1] if step > 0 else unit[first]
            length[block] -= 1
            length[block + step] += 1
            block += step
            if sums[block] + moved < sums[largest]:
                break
    return _filled(length)


def _balanced(weights: Sequence[float], count: int) -> list[int]:
    """Lengths of blocks with the least possible largest sum of weights."""
    return chain(len(weights), count, _sum_of(weights))


def _pipedream(atoms: Atoms, seconds: Sequence[float], stages: int, link: Link) -> list[int]:
    """``A(j, m) = min over i of max(A(i, m - 1), 2 a_i / B, T(i + 1, j))`` (Narayanan et al. 2019).

    a_i is the output of operator i: what earlier operators send past it is not counted.
    """
    sent = [0.0] * len(atoms)
    for flow in atoms.flows:
        if flow.maker >= 0:
            sent[flow.maker] += flow.bytes
    load = _sum_of(seconds)

    def cost(first: int, last: int) -> float:
        transfer = 2 * link.seconds(sent[first - 1]) if first else 0.0
        return max(transfer, load(first, last))

    return chain(len(atoms), stages, cost)


def chain(length: int, count: int, cost: Callable[[int, int], float]) -> list[int]:
    """Lengths of the blocks of a sequence with the least possible largest cost.

    Args:
        length: of the sequence.
        count: of the blocks; none is empty.
        cost: of the block from one position up to, not including, another one.
    """
    best = [[math.inf] * (length + 1) for _ in range(count + 1)]
    parent = [[0] * (length + 1) for _ in range(count + 1)]
    best[0][0] = 0.0
    for j in range(1, count + 1):
        for last in range(j, length + 1):
            for first in range(last - 1, j - 2, -1):
                value = max(best[j - 1][first], cost(first, last))
                if value < best[j][last]:
                    best[j][last], parent[j][last] = value, first
    lengths, last = [], length
    for j in range(count, 0, -1):
        lengths.append(last - parent[j][last])
        last = parent[j][last]
    return lengths[::-1]


def _sum_of(weights: Sequence[float]) -> Callable[[int, int], float]:
    sums = [0.0]
    for weight in weights:
        sums.append(sums[-1] + weight)
    return lambda first, last: sums[last] - sums[first]


def _edges(lengths: Sequence[int]) -> list[tuple[int, int]]:
    result, first = [], 0
    for length in lengths:
        result.append((first, first + length))
        first += length
    return result


def _filled(lengths: list[int]) -> list[int]:
    """No empty block: one takes an element of the longest."""
    while 0 in lengths:
        lengths[lengths.index(max(lengths))] -= 1
        lengths[lengths.index(0)] += 1
    return lengths


def _assignment(atoms: Atoms, lengths: Sequence[int]) -> list[int]:
    bounds = [sum(1 << atom for atom in range(last)) for _, last in _edges(lengths)]
    return atoms.assignment(bounds)
