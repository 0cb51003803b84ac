"""Two programs to the list of what differs between them."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from graphopt.diff.items import Item, Numbering, items_of
from graphopt.diff.match import match
from graphopt.plan import Phase
from graphopt.text.names import word_of
from graphopt.text.syntax import Program, TensorType, Type
from graphopt.text.writer import write_type

ROOT = "(root)"
_CASTS = frozenset({"aten._to_copy.default", "aten.to.dtype", "prims.convert_element_type.default"})


class Kind(StrEnum):
    """What happened to a line.

    ``CHANGED``: other arguments, module, phase or recompute policy. ``RETYPED``: its value has
    another type. ``REWIRED``: it only uses other values.
    """

    ADDED = "added"
    REMOVED = "removed"
    CHANGED = "changed"
    RETYPED = "retyped"
    REWIRED = "rewired"


@dataclass(frozen=True)
class Change:
    """One input, node or output that differs.

    Attributes:
        kind: what happened to it.
        what: what a summary counts: ``"cast f32 -> bf16"``, ``"aten.mm.default"``.
        module: qualified name of the module that it belongs to; ``""`` for the root.
        phase: the half of the step.
        before: its line in the first program; ``""`` when added.
        after: its line in the second program; ``""`` when removed.
    """

    kind: Kind
    what: str
    module: str
    phase: Phase
    before: str
    after: str


def compare(before: Program, after: Program) -> tuple[tuple[Change, ...], int]:
    """All changes in the order of `after`, and how many lines run in another order.

    Removed lines stand behind the line that they followed in `before`.
    """
    numbering = Numbering()
    old, new = items_of(before, numbering), items_of(after, numbering)
    pairs = match(old, new)
    partner = {b.position: a.position for b, a in pairs}
    found = [(a.position, _compared(b, a, new, partner)) for b, a in pairs]
    kept = set(partner.values())
    found += [(a.position, _alone(a, Kind.ADDED, new)) for a in new if a.position not in kept]
    place = -1
    for item in old:
        place = partner.get(item.position, place)
        if item.position not in partner:
            found.append((place, _alone(item, Kind.REMOVED, old)))
    found.sort(key=lambda row: row[0])
    changes = tuple(change for _, change in found if change)
    return changes, _moved([b.position for b, _ in pairs])


def _compared(
    before: Item, after: Item, new: Sequence[Item], partner: dict[int, int]
) -> Change | None:
    what = _what(after, new)
    if _meaning(before) != _meaning(after):
        kind = Kind.CHANGED
    elif before.type != after.type:
        kind, what = Kind.RETYPED, f"{what} {_arrow(before.type, after.type)}"
    elif tuple(partner.get(used) for used in before.operands) != after.operands:
        kind = Kind.REWIRED
    else:
        return None
    lines = _line(before, after), _line(after, before)
    return Change(kind, what, after.module, after.phase, *lines)


def _line(item: Item, other: Item) -> str:
    """The line of an item, with its module and phase where those of `other` differ."""
    module = f" @{item.module or ROOT}" if item.module != other.module else ""
    phase = f" in {item.phase}" if item.phase != other.phase else ""
    return f"{item.line}{module}{phase}"


def _meaning(item: Item) -> tuple[str, ...]:
    return (item.detail, item.module, item.phase, item.recompute)


def _alone(item: Item, kind: Kind, items: Sequence[Item]) -> Change:
    before, after = (item.line, "") if kind is Kind.REMOVED else ("", item.line)
    return Change(kind, _what(item, items), item.module, item.phase, before, after)


def _what(item: Item, items: Sequence[Item]) -> str:
    """What a summary calls an item; the same for the same line of another layer."""
    if item.is_slot:
        return f"{item.op} {item.detail.rpartition('.')[2]}"
    if item.op in _CASTS and item.operands:
        source = items[item.operands[0]].type
        if _dtype(source) != _dtype(item.type):
            return f"cast {_dtype(source)} -> {_dtype(item.type)}"
    return item.op


def _dtype(type_: Type) -> str:
    return word_of(type_.dtype) if isinstance(type_, TensorType) else ""


def _arrow(before: Type, after: Type) -> str:
    """The dtypes where they differ, else the whole types."""
    dtypes = _dtype(before), _dtype(after)
    if dtypes[0] != dtypes[1] and all(dtypes):
        return " -> ".join(dtypes)
    return f"{write_type(before)} -> {write_type(after)}"


def _moved(positions: Sequence[int]) -> int:
    """How many must move to bring `positions` into order: all but a longest rising run."""
    ends: list[int] = []  # ends[n]: smallest end of a rising subsequence of length n + 1
    for position in positions:
        index = bisect.bisect_left(ends, position)
        ends[index : index + 1] = [position]
    return len(positions) - len(ends)
