"""Sets of operators that can be done first: closed under predecessors (downsets, order ideals).

The stages of a pipeline that only feeds forward are the differences of a growing chain of them.
"""

from __future__ import annotations

from collections.abc import Sequence

from graphopt.partitioning.atoms import Atoms, bits

CAP = 50_000


def downsets(atoms: Atoms, cap: int = CAP) -> list[int] | None:
    """All downsets as masks, smaller ones first; None if there are more than `cap`."""
    before, after = atoms.before, atoms.after()
    minimal = sum(1 << a for a, mask in enumerate(before) if not mask)
    # Each set with what can be added to it.
    layer = {0: minimal}
    result = [0]
    while layer:
        following: dict[int, int] = {}
        for mask, ready in layer.items():
            for atom in bits(ready):
                bigger = mask | 1 << atom
                if bigger in following:
                    continue
                freed = ready ^ (1 << atom)
                for other in bits(after[atom]):
                    if not before[other] & ~bigger:
                        freed |= 1 << other
                following[bigger] = freed
            if len(result) + len(following) > cap:
                return None
        result.extend(following)
        layer = following
    return result


def prefixes(order: Sequence[int]) -> list[int]:
    """The downsets of one order of the atoms."""
    result, mask = [0], 0
    for atom in order:
        mask |= 1 << atom
        result.append(mask)
    return result
