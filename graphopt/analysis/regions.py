"""The nodes of a graph, grouped by the module that they come from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from graphopt.graph import Graph, module_of, module_stack
from graphopt.plan import Role


@dataclass(frozen=True)
class Region:
    """One module with everything that was captured from it.

    Attributes:
        path: qualified name, ``""`` for the whole model.
        kind: class name; ``""`` where nothing was captured inside a call of it (``ModuleList``).
        nodes: operators of this module itself, forward and backward, in graph order.
        parameters: qualified names of its own parameters that the graph reads.
        children: submodules, in the order in which they first run.
    """

    path: str
    kind: str
    nodes: tuple[fx.Node, ...]
    parameters: tuple[str, ...]
    children: tuple[Region, ...]

    def walk(self) -> Iterator[Region]:
        """This region and all below it, parents first."""
        yield self
        for child in self.children:
            yield from child.walk()


def regions(graph: Graph) -> Region:
    """The tree of modules of `graph`.

    Every operator is in exactly one region. One without a module (the sum of two gradients) is in
    the root.
    """
    kinds: dict[str, str] = {}
    nodes: dict[str, list[fx.Node]] = {"": []}
    parameters: dict[str, list[str]] = {}
    for node in graph.operators:
        kinds.update(module_stack(node))
        nodes.setdefault(module_of(node), []).append(node)
    for name in graph.signature.names(Role.PARAM):
        parameters.setdefault(_parent(name), []).append(name)
    children: dict[str, list[str]] = {}
    for path in list(dict.fromkeys([*nodes, *parameters])):
        _link(path, children)

    def build(path: str) -> Region:
        return Region(
            path=path,
            kind=kinds.get(path, ""),
            nodes=tuple(nodes.get(path, ())),
            parameters=tuple(parameters.get(path, ())),
            children=tuple(build(child) for child in children.get(path, ())),
        )

    return build("")


def _parent(path: str) -> str:
    return path.rpartition(".")[0]


def _link(path: str, children: dict[str, list[str]]) -> None:
    """Add `path` and its ancestors to the children of their parents, once each."""
    while path:
        siblings = children.setdefault(_parent(path), [])
        if path in siblings:
            return
        siblings.append(path)
        path = _parent(path)
