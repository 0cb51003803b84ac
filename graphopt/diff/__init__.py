"""What differs between two graphs, by module: the answer to "what did this pass do?".

Lines are compared by what they compute: names of values do not count, and a change early in a graph
does not make everything after it different. Facts and annotations are not compared.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass

from graphopt.diff.collapse import Family, collapse
from graphopt.diff.compare import ROOT, Change, Kind, compare
from graphopt.graph import Graph
from graphopt.plan import Phase
from graphopt.text.lift import lift_graph
from graphopt.text.reader import read_program
from graphopt.text.source import Source
from graphopt.text.syntax import Program

__all__ = ["Change", "Count", "Diff", "Family", "Kind", "diff_graphs", "diff_texts"]

_MARKS = {Kind.ADDED: "+", Kind.REMOVED: "-"}


@dataclass(frozen=True)
class Count:
    """How often something happened: 12 casts were added to the forward half."""

    number: int
    kind: Kind
    what: str
    phase: Phase

    def __str__(self) -> str:
        where = " in backward" if self.phase is Phase.BACKWARD else ""
        return f"{_MARKS.get(self.kind, '~')} {self.number} x {self.what} {self.kind}{where}"


@dataclass(frozen=True)
class Diff:
    """All that differs between two graphs; false when nothing does.

    Attributes:
        changes: in the order of the second graph.
        moved: how many lines run in another order.
    """

    changes: tuple[Change, ...]
    moved: int

    def __bool__(self) -> bool:
        return bool(self.changes or self.moved)

    @property
    def headline(self) -> str:
        """One line: how many lines were added, removed and so on."""
        kinds = Counter(change.kind for change in self.changes)
        parts = [f"{kinds[kind]} {kind}" for kind in Kind if kinds[kind]]
        if self.moved:
            parts.append(f"{self.moved} moved")
        return ", ".join(parts) or "no difference"

    @property
    def families(self) -> tuple[Family, ...]:
        """The modules with changes; those with the same changes are put together."""
        modules = dict.fromkeys(change.module for change in self.changes)
        return collapse({module: self.counts([module]) for module in modules})

    def counts(self, modules: Collection[str]) -> tuple[Count, ...]:
        """What happened in these modules, summed up."""
        found = Counter(
            (change.kind, change.what, change.phase)
            for change in self.changes
            if change.module in modules
        )
        order = [*Kind, *Phase]
        rows = sorted(found, key=lambda row: (order.index(row[0]), order.index(row[2]), row[1]))
        return tuple(Count(found[row], *row) for row in rows)

    def lines(self, module: str) -> Iterator[str]:
        """The lines of one module that differ, marked ``-`` for before and ``+`` for after."""
        for change in self.changes:
            if change.module == module:
                if change.before:
                    yield f"- {change.before}"
                if change.after:
                    yield f"+ {change.after}"

    def render(self, width: int = 100) -> str:
        """The difference as plain text in lines of at most `width` characters.

        Modules with the same changes are one entry, with the lines of the first of them.
        """
        text = [self.headline]
        for family in self.families:
            number = len(family.modules)
            title = family.path or ROOT
            text += ["", f"{title}  ({number} modules)" if number > 1 else title]
            text += [f"  {count}" for count in self.counts(family.modules)]
            text += [f"      {line}" for line in self.lines(family.modules[0])]
        return "\n".join(line if len(line) <= width else f"{line[: width - 1]}…" for line in text)

    def to_json(self) -> str:
        """The difference as JSON: headline, changes, moved."""
        return json.dumps({"headline": self.headline, **asdict(self)}, indent=1)


def diff_graphs(before: Graph, after: Graph) -> Diff:
    """What differs between two graphs; raises `TextError` for one that cannot be printed."""
    return _diff(lift_graph(before), lift_graph(after))


def diff_texts(before: str, after: str) -> Diff:
    """What differs between two texts; raises `TextError` for one that cannot be read.

    Nothing is run, so the constants that the texts hold by reference are not needed.
    """
    return _diff(read_program(Source(before)), read_program(Source(after)))


def _diff(before: Program, after: Program) -> Diff:
    changes, moved = compare(before, after)
    return Diff(changes, moved)
