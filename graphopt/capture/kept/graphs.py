"""A captured graph as `.gopt` text, with what a text does not say: stacks of modules and calls."""

from __future__ import annotations

import json
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.capture.kept.fingerprints import Unkept
from graphopt.capture.kept.sources import Unreadable
from graphopt.errors import TextError
from graphopt.graph import Graph, Level
from graphopt.plan import OutputAlias
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


def graph_data(graph: Graph, aliases: tuple[OutputAlias, ...]) -> dict[str, Any]:
    """The graph as data.

    Raises:
        Unkept: it holds something that is no text.
    """
    if any(_is_symbolic(node.meta.get("val")) for node in graph.nodes):
        raise Unkept("numbers that it reads off tensors, or sizes, are symbols of its graph")
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
        "traces": traces.rows,
        "stacks": stacks.rows,
        "nodes": nodes,
        "aliases": [to_data(alias) for alias in aliases],
    }


def _is_symbolic(value: object) -> bool:
    """Whether a value is a symbol, or a tensor with one in its shape."""
    if isinstance(value, Tensor):
        return any(isinstance(size, torch.SymInt) for size in value.shape)
    if isinstance(value, tuple | list):
        return any(map(_is_symbolic, value))
    return isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool)


def _class(kind: object) -> str:
    return f"{kind.__module__}.{kind.__qualname__}" if isinstance(kind, type) else str(kind)


def read_graph(data: Any) -> tuple[Graph, tuple[OutputAlias, ...]]:
    """The inverse of `graph_data`.

    Raises:
        Unreadable: it is no graph.
    """
    try:
        data = json.loads(data)
        graph = parse_graph(data["text"], typed=True)
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
    count = len(graph.signature.inputs)
    if any(not 0 <= alias.input < count for alias in aliases):
        raise Unreadable("it returns an input that there is not")
    return graph, aliases


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
