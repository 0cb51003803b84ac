"""The graph of a step as a `networkx` graph, for questions that need one."""

from __future__ import annotations

import networkx as nx
from torch import fx

from graphopt.graph import Graph, operator_name, phase_of
from graphopt.plan import Phase


def dependency(graph: Graph) -> nx.DiGraph[fx.Node]:
    """Producer to user edges between all nodes of `graph`, frozen; nodes are in graph order."""
    result: nx.DiGraph[fx.Node] = nx.DiGraph()
    result.add_nodes_from(graph.nodes)
    result.add_edges_from((source, node) for node in graph.nodes for source in node.all_input_nodes)
    return nx.freeze(result)


def backward_operators(graph: Graph) -> tuple[fx.Node, ...]:
    """The operators of the backward half, in order; a ``getitem`` does not count."""
    return tuple(
        node
        for node in graph.operators
        if phase_of(node) is Phase.BACKWARD and operator_name(node) != "getitem"
    )


def backward_before(graph: Graph, node: fx.Node) -> int:
    """How many backward operators must have run before `node` can, in any order of execution."""
    ancestors = nx.ancestors(graph.get(dependency), node)
    return sum(operator in ancestors for operator in graph.get(backward_operators))
