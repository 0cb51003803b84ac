"""Who can see a piece of memory, and so which values may live in the same one.

Two equal values may be merged, and a copy may be replaced by its source, only if nobody can tell.
The user can tell by writing into an output, an input or a parameter whenever the graph is not
running, including between forward and backward.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from enum import Flag, auto
from types import MappingProxyType

from torch import fx

from graphopt.analysis.aliasing import storage
from graphopt.analysis.effects import writes
from graphopt.graph import Graph, phase_of
from graphopt.plan import Phase, Role


class Seen(Flag):
    """Who sees a piece of memory.

    ``GIVEN``: it comes from outside, as an input or as an attribute of the module. ``RETURNED``:
    the user gets it, or a view of it. ``STORED``: it is copied into a buffer after its half of the
    step. ``KEPT``: forward makes it and backward reads it. ``WRITTEN``: an operator writes into it.
    """

    GIVEN = auto()
    RETURNED = auto()
    STORED = auto()
    KEPT = auto()
    WRITTEN = auto()


REASONS: Mapping[str, str] = MappingProxyType(
    {
        "escapes": "the result would share memory with another output or with an input",
        "snapshot": "backward reads one of the two, and the user may change the other before",
        "mutated": "an operator writes into the memory of one of the two",
    }
)
"""Why two values may not share memory, by reason code."""

_NOBODY = Seen(0)


class Sharing:
    """Who sees what in a graph, while a pass merges values.

    A snapshot: it follows the merges reported to `merge` and no other change of the graph. It stays
    safe after deletions, since it can then only overestimate the readers.
    """

    def __init__(self, graph: Graph) -> None:
        self._owner = dict(storage(graph).owner)
        self._merged: dict[fx.Node, fx.Node] = {}
        self._seen: dict[fx.Node, Seen] = {}
        for node in graph.nodes:
            if node.op in ("placeholder", "get_attr"):
                self._add(node, Seen.GIVEN)
            elif node.op == "call_function":
                if phase_of(node) is Phase.BACKWARD:
                    self._keep(node)
                if writes(node):
                    for operand in node.all_input_nodes:
                        self._add(operand, Seen.WRITTEN)
        for slot, node in zip(graph.signature.outputs, graph.outputs, strict=True):
            self._add(node, Seen.STORED if slot.role is Role.MUTATION else Seen.RETURNED)
            if slot.phase is Phase.BACKWARD and phase_of(node) is Phase.FORWARD:
                self._add(node, Seen.KEPT)

    def owner(self, node: fx.Node) -> fx.Node:
        """The node whose memory the value of `node` lies in, after all merges."""
        found = self._owner.get(node, node)
        while found in self._merged:
            found = self._merged[found]
        return found

    def seen(self, node: fx.Node) -> Seen:
        """Who sees the memory of `node`."""
        return self._seen.get(self.owner(node), _NOBODY)

    def obstacle(self, one: fx.Node, other: fx.Node) -> str:
        """Why two equal values may not live in the same memory: a key of `REASONS`, or ``""``."""
        first, second = self.seen(one), self.seen(other)
        if (first | second) & Seen.WRITTEN:
            return "mutated"
        for left, right in ((first, second), (second, first)):
            if left & Seen.RETURNED and right & (Seen.RETURNED | Seen.GIVEN):
                return "escapes"
            # Buffers are written one after the other: the source must not be one of them.
            if left & Seen.STORED and right & Seen.GIVEN:
                return "escapes"
        for left, right in ((first, second), (second, first)):
            if left & Seen.KEPT and right & (Seen.RETURNED | Seen.GIVEN):
                return "snapshot"
        return ""

    def merge(self, removed: fx.Node, kept: fx.Node) -> None:
        """Note that readers of `removed` now read `kept`."""
        source, target = self.owner(removed), self.owner(kept)
        if source is not target:
            self._seen[target] = self.seen(target) | self.seen(source)
            self._merged[source] = target

    def _keep(self, reader: fx.Node) -> None:
        for node in reader.all_input_nodes:
            if phase_of(node) is Phase.FORWARD:
                # A piece of a tuple has its own memory, but only the tuple crosses to backward.
                self._add(reader if reader.target is operator.getitem else node, Seen.KEPT)

    def _add(self, node: fx.Node, seen: Seen) -> None:
        owner = self._owner[node]
        self._seen[owner] = self._seen.get(owner, _NOBODY) | seen
