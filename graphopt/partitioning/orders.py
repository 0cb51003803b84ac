"""Orders in which all atoms can run. The prefixes of one order are few downsets to choose from."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from graphopt.partitioning.atoms import Atoms, bits

Choose = Callable[[list[int], int], int]
"""Which of the ready atoms comes next, given the mask of those that ran."""

RANDOM_ORDERS = 2


def orders(atoms: Atoms) -> Iterator[tuple[str, list[int]]]:
    """Several orders by name: as given, depth first, fewest bytes alive, and random ones."""
    yield "as given", list(range(len(atoms)))
    yield "depth first", run(atoms, lambda ready, _: ready[-1])
    yield "fewest bytes alive", run(atoms, _fewest_bytes(atoms))
    for seed in range(RANDOM_ORDERS):
        yield f"random {seed}", run(atoms, _drawn(seed))


def run(atoms: Atoms, choose: Choose) -> list[int]:
    """The order in which `choose` takes ready atoms, listed in the order of becoming ready."""
    after = atoms.after()
    waiting = [mask.bit_count() for mask in atoms.before]
    ready = [a for a in reversed(range(len(atoms))) if not waiting[a]]
    done, result = 0, []
    while ready:
        atom = choose(ready, done)
        ready.remove(atom)
        result.append(atom)
        done |= 1 << atom
        for other in reversed(list(bits(after[atom]))):
            waiting[other] -= 1
            if not waiting[other]:
                ready.append(other)
    return result


def _drawn(seed: int) -> Choose:
    generator = random.Random(seed)
    return lambda ready, _: generator.choice(ready)


def _fewest_bytes(atoms: Atoms) -> Choose:
    made: list[int] = [0] * len(atoms)
    reads: list[list[tuple[int, int]]] = [[] for _ in range(len(atoms))]
    for flow in atoms.flows:
        if flow.maker >= 0:
            made[flow.maker] += flow.bytes
        if flow.final:
            continue
        for reader in bits(flow.readers):
            reads[reader].append((flow.readers, flow.bytes))

    def choose(ready: list[int], done: int) -> int:
        def growth(atom: int) -> tuple[int, int]:
            after = done | 1 << atom
            freed = sum(size for readers, size in reads[atom] if not readers & ~after)
            return made[atom] - freed, atom

        return min(ready, key=growth)

    return choose
