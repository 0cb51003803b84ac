"""The list of hand-made graphs that break one named invariant each, and how to put one on it.

Each function on it returns the graph, the name of the node that is to be blamed (``""`` for none)
and part of the sentence about it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from graphopt.graph import Graph
from graphopt.plan import Role
from tests.support.graphs import Builder

Broken = tuple[Graph, str, str]
BROKEN: list[Any] = []


def breaks(invariant: str) -> Callable[[Callable[[], Broken]], Callable[[], Broken]]:
    def register(function: Any) -> Any:
        function.invariant = invariant
        BROKEN.append(function)
        return function

    return register


def named(graph: Graph, name: str) -> fx.Node:
    return next(node for node in graph.nodes if node.name == name)


def one_input() -> tuple[Builder, fx.Node]:
    b = Builder()
    return b, b.input(Role.INPUT, "0", (4,))
