"""Which line of one program is which line of another, whatever their names.

First come inputs and outputs, by role and name; then everything that computes the same value; then,
in order of execution, what is left is paired by operator, arguments and module, best with a line
whose operands are already paired.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence

from graphopt.diff.items import Item

Key = Callable[[Item], Hashable]


def match(before: Sequence[Item], after: Sequence[Item]) -> list[tuple[Item, Item]]:
    """Pairs of corresponding lines, in the order of `after`; each line is in at most one pair."""
    return _Matcher(before, after).run()


class _Matcher:
    def __init__(self, before: Sequence[Item], after: Sequence[Item]) -> None:
        self._before = before
        self._after = after
        self._partner: dict[int, int] = {}  # position in after -> position in before
        self._taken: set[int] = set()

    def run(self) -> list[tuple[Item, Item]]:
        self._pair_equal(lambda i: (i.op, i.detail) if i.is_slot else None)
        # Equal values several times over: prefer the same place in the model, then the same text.
        self._pair_equal(lambda i: (i.number, i.module, i.phase, i.line))
        self._pair_equal(lambda i: (i.number, i.module, i.phase))
        self._pair_equal(lambda i: i.number)
        self._pair_similar()
        pairs = sorted(self._partner.items())
        return [(self._before[b], self._after[a]) for a, b in pairs]

    def _pair(self, before: Item, after: Item) -> None:
        self._partner[after.position] = before.position
        self._taken.add(before.position)

    def _free(self) -> tuple[list[Item], list[Item]]:
        return (
            [item for item in self._before if item.position not in self._taken],
            [item for item in self._after if item.position not in self._partner],
        )

    def _pair_equal(self, key: Key) -> None:
        """Pair free items of equal key in order; a key of ``None`` pairs with nothing."""
        before, after = self._free()
        waiting: dict[Hashable, list[Item]] = defaultdict(list)
        for item in reversed(before):
            waiting[key(item)].append(item)
        for item in after:
            wanted = key(item)
            if wanted is not None and waiting.get(wanted):
                self._pair(waiting[wanted].pop(), item)

    def _pair_similar(self) -> None:
        before, after = self._free()
        tiers = [
            _Tier(lambda i: (i.op, i.detail, i.module, i.phase), before, after, fewest=0),
            _Tier(lambda i: (i.op, i.module, i.phase), before, after, fewest=1),
            _Tier(lambda i: (i.op, i.detail), before, after, fewest=1),
        ]
        for item in after:
            if item.is_slot:
                continue
            for tier in tiers:
                found = self._best(item, tier)
                if found:
                    self._pair(found, item)
                    break

    def _best(self, item: Item, tier: _Tier) -> Item | None:
        """The free item that shares most operands with `item`; the first of several."""
        key = tier.key(item)
        candidates = [c for c in tier.before[key] if c.position not in self._taken]
        scored = [(self._shared(c, item), c) for c in candidates]
        most = max((score for score, _ in scored), default=-1)
        if most < tier.fewest:
            return None
        best = (c for score, c in scored if score == most)
        if most > 0:
            return next(best)
        # Sharing nothing, it must not take what fits a later item better.
        others = (other for other in tier.after[key] if other is not item)
        rivals = [other for other in others if other.position not in self._partner]
        return next((c for c in best if not any(self._shared(c, r) for r in rivals)), None)

    def _shared(self, before: Item, after: Item) -> int:
        """How many operands correspond; two items without operands share one."""
        if not before.operands and not after.operands:
            return 1
        operands = zip(before.operands, after.operands, strict=False)
        return sum(self._partner.get(new) == old for old, new in operands)


class _Tier:
    """One way of being similar: an equal key and at least `fewest` shared operands."""

    def __init__(
        self, key: Key, before: Sequence[Item], after: Sequence[Item], *, fewest: int
    ) -> None:
        self.key = key
        self.fewest = fewest
        self.before = _grouped(before, key)
        self.after = _grouped(after, key)


def _grouped(items: Sequence[Item], key: Key) -> dict[Hashable, list[Item]]:
    groups: dict[Hashable, list[Item]] = defaultdict(list)
    for item in items:
        if not item.is_slot:
            groups[key(item)].append(item)
    return groups
