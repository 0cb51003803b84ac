"""A captured graph as `.gopt` text, with what a text does not say: stacks of modules and calls."""

from __future__ import annotations

import json
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.capture.kept.expressions import Tree
from graphopt.capture.kept.fingerprints import Unkept
from graphopt.capture.kept.sizes import Symbolic
from graphopt.capture.kept.sources import Unreadable
from graphopt.errors import TextError
from graphopt.graph import Graph, Level
from graphopt.plan import OutputAlias, Role
from graphopt.plan.part import from_data, to_data
from graphopt.text import parse_graph, print_graph
from graphopt.text.elements import inlined

_STACKS = ("nn_module_stack", "fwd_nn_module_stack")


class _Table:
    """Values that occur often, each once."""

    def __init__(self) -> None:
        self.rows: list[Any] = []
        self._at: dict[Hashable, int] = {}

    def add(self, key: Hashable, row: Any) -> int:
        if key not in self._at:
            self._at[key] = len(self.rows)
            self.rows.append(row)
        return self._at[key]


def graph_data(
    graph: Graph, aliases: tuple[OutputAlias, ...], known: Sequence[Tree] = ()
) -> dict[str, Any]:
    """The graph as data.

    Args:
        graph: it.
        aliases: outputs of the model that are no outputs of the graph.
        known: conditions on its symbols, by the names that its text has for them.

    Raises:
        Unkept: it holds something that is no text.
    """
    if any(_depends_on_data(node.meta.get("val")) for node in graph.nodes):
        raise Unkept("numbers that it reads off tensors are symbols of its graph")
    for node in graph.fx.find_nodes(op="get_attr"):
        value = getattr(graph.module, str(node.target), None)
        if not isinstance(value, Tensor):
            raise Unkept("its graph holds other graphs")
        if inlined(value) is None:
            raise Unkept("its graph holds a large constant")
    try:
        text = print_graph(graph)
    except TextError as error:
        raise Unkept(error.message) from error
    stacks, traces = _Table(), _Table()
    nodes = []
    # Numbers count up within a process.
    first = min((node.meta.get("seq_nr") or 0 for node in graph.nodes), default=0)
    for node in graph.nodes:
        number = node.meta.get("seq_nr")
        row: list[Any] = [None if number is None else number - first]
        trace = node.meta.get("stack_trace")
        row.append(None if trace is None else traces.add(trace, trace))
        for name in _STACKS:
            stack = node.meta.get(name)
            if stack is None:
                row.append(None)
            else:
                told = [[path, _class(kind)] for path, kind in stack.values()]
                row.append(stacks.add(str(told), told))
        nodes.append(row)
    return {
        "text": text,
        "known": list(known),
        "traces": traces.rows,
        "stacks": stacks.rows,
        "nodes": nodes,
        "aliases": [to_data(alias) for alias in aliases],
    }


def _depends_on_data(value: object) -> bool:
    """Whether a value is a number that depends on data, or a tensor with one in its shape."""
    if isinstance(value, Tensor):
        return any(map(_depends_on_data, value.shape))
    if isinstance(value, tuple | list):
        return any(map(_depends_on_data, value))
    if not isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
        return False
    return not value.node.has_hint()


def _class(kind: object) -> str:
    return f"{kind.__module__}.{kind.__qualname__}" if isinstance(kind, type) else str(kind)


def read_graph(data: Any) -> tuple[Graph, tuple[OutputAlias, ...], Symbolic]:
    """The inverse of `graph_data`, and what is known of its symbols.

    Raises:
        Unreadable: it is no graph.
    """
    try:
        data = json.loads(data)
        known = Symbolic(data["known"])
        graph = parse_graph(data["text"], typed=True, known=known)
        nodes = graph.nodes
        if graph.level not in (Level.JOINT, Level.INFERENCE) or len(nodes) != len(data["nodes"]):
            raise Unreadable("it has another graph")
        stacks = [
            {str(i): (path, kind) for i, (path, kind) in enumerate(s)} for s in data["stacks"]
        ]
        for node, row in zip(nodes, data["nodes"], strict=True):
            _annotate(node, row, data["traces"], stacks)
        aliases = tuple(from_data(OutputAlias, alias) for alias in data["aliases"])
    except Unreadable:
        raise
    except Exception as error:  # what was edited by hand fails anywhere
        raise Unreadable(f"its graph cannot be read: {error}") from error
    roles = [slot.role for slot in graph.signature.inputs]
    for alias in aliases:
        if not 0 <= alias.input < len(roles):
            raise Unreadable("it returns an input that there is not")
        if any(i >= len(roles) or roles[i] is not Role.SIZE for i in alias.reads()):
            raise Unreadable("it returns a view whose size is none")
    return graph, aliases, known


def _annotate(node: fx.Node, row: Any, traces: Any, stacks: Any) -> None:
    number, trace, *found = row
    for name, at in zip(_STACKS, found, strict=True):
        node.meta.pop(name, None)
        if at is not None:
            node.meta[name] = stacks[at]
    if number is not None:
        node.meta["seq_nr"] = int(number)
    if trace is not None:
        node.meta["stack_trace"] = str(traces[trace])
