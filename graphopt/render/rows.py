"""A tree of modules as lines that fit a screen, for every output format."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from graphopt.analysis.summary import Summary


@dataclass(frozen=True)
class Row:
    """One line of a module table.

    Attributes:
        level: depth below the whole model.
        label: last part of the qualified name, or a range of them (``"0 … 11"``).
        times: how many equal modules the line stands for; the figures are those of one.
        summary: the figures.
        children: lines below this one.
    """

    level: int
    label: str
    times: int
    summary: Summary
    children: tuple[Row, ...]

    def walk(self, depth: int) -> Iterator[Row]:
        """This line and those at most `depth` levels below the whole model."""
        yield self
        if self.level < depth:
            for child in self.children:
                yield from child.walk(depth)

    @property
    def height(self) -> int:
        """Level of the deepest line."""
        return max((child.height for child in self.children), default=self.level)


def rows(summary: Summary, name: str = "model") -> Row:
    """The tree of lines; neighbours with equal figures all the way down become one line."""
    return _row([summary], 0, name)


def fitting_depth(row: Row, lines: int) -> int:
    """The largest depth with at most `lines` lines; at least 1."""
    depth = 1
    while depth < row.height and sum(1 for _ in row.walk(depth + 1)) <= lines:
        depth += 1
    return depth


def _row(equal: Sequence[Summary], level: int, name: str) -> Row:
    first = equal[0]
    groups = groupby(first.children, key=lambda child: _nameless(child, child.path))
    children = tuple(_row(list(group), level + 1, "") for _, group in groups)
    names = [s.path.rpartition(".")[2] for s in equal]
    label = name or (", ".join(names) if len(names) <= 2 else f"{names[0]} … {names[-1]}")
    return Row(level, label, len(equal), first, children)


def _nameless(summary: Summary, root: str) -> Summary:
    """The same figures with names relative to `root`, so that equal modules compare equal."""
    children = tuple(_nameless(child, root) for child in summary.children)
    return replace(summary, path=summary.path[len(root) :], children=children)
