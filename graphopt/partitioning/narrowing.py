"""Problems with too many downsets, made narrower by giving up some partitions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

from graphopt.partitioning.atoms import Atoms, bits
from graphopt.partitioning.downsets import downsets

# A contracted chain holds at most this share of an average stage, so that stages still balance.
SHARE = 0.25


def contracted_chains(atoms: Atoms, stages: int) -> list[list[int]]:
    """Sets of operators (positions in the problem) of chains without branches.

    Neighbours where the first has one successor and the second one predecessor are joined as long
    as they stay a small share of a stage. Loses partitions that cut inside of such a chain.
    """
    after = atoms.after()
    seconds = [f + b for f, b in zip(atoms.forward, atoms.backward, strict=True)]
    most = SHARE * math.fsum(seconds) / stages
    chains: list[list[int]] = []
    load: list[float] = []
    place: dict[int, int] = {}
    for atom in range(len(atoms)):
        before = atoms.before[atom]
        if before.bit_count() == 1:
            (only,) = bits(before)
            chain = place[only]
            if after[only].bit_count() == 1 and load[chain] + seconds[atom] <= most:
                chains[chain].append(atom)
                load[chain] += seconds[atom]
                place[atom] = chain
                continue
        place[atom] = len(chains)
        chains.append([atom])
        load.append(seconds[atom])
    return [[o for atom in chain for o in atoms.members[atom]] for chain in chains]


def regions(atoms: Atoms) -> Iterator[list[int]]:
    """The atoms between two that every order runs at the same place, in topological order.

    An atom that all others come before or after (a bridge) separates what precedes from what
    follows: the downsets of the whole are those of the regions, one after the other.
    """
    earlier = [0] * len(atoms)
    for atom, before in enumerate(atoms.before):
        earlier[atom] = before
        for other in bits(before):
            earlier[atom] |= earlier[other]
    later = [0] * len(atoms)
    for atom, mask in enumerate(earlier):
        for other in bits(mask):
            later[other] |= 1 << atom
    others = len(atoms) - 1
    region: list[int] = []
    for atom in range(len(atoms)):
        if earlier[atom].bit_count() + later[atom].bit_count() == others:
            if region:
                yield region
            region = []
        else:
            region.append(atom)
    if region:
        yield region


def chained(atoms: Atoms, order: Sequence[int], cap: int) -> list[tuple[int, int]]:
    """Edges between operators that fix the order within the widest regions.

    Regions become chains, the widest first, until the whole has at most `cap` downsets. Loses the
    partitions that no prefix of `order` gives within those regions.
    """
    place = {atom: index for index, atom in enumerate(order)}
    widths = [(_width(atoms, region, cap), region) for region in regions(atoms)]
    widths.sort(key=lambda w: -w[0])
    total = sum(width for width, _ in widths) + len(atoms)
    edges = []
    for width, region in widths:
        if total <= cap:
            break
        total -= width - len(region)
        line = sorted(region, key=place.__getitem__)
        for first, second in itertools.pairwise(line):
            edges.append((atoms.members[first][0], atoms.members[second][0]))
    return edges


def _width(atoms: Atoms, region: Sequence[int], cap: int) -> int:
    """Downsets of a region; one more than `cap` where there are more."""
    place = {atom: index for index, atom in enumerate(region)}
    before = tuple(
        sum(1 << place[b] for b in bits(atoms.before[atom]) if b in place) for atom in region
    )
    nothing = (0.0,) * len(region)
    members = tuple((index,) for index in range(len(region)))
    inner = Atoms(members, before, nothing, nothing, (), (), (), (), ())
    found = downsets(inner, cap)
    return cap + 1 if found is None else len(found)
