"""Recurrent networks under K-FAC: two weights per layer and direction, shared over time.

Martens et al. ("Kronecker-factored curvature approximations for recurrent neural networks", ICLR
2018) treat time steps as shared positions; so does this, in the "expand" setting.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from operator import getitem
from typing import Any

import torch
from torch import fx

import graphopt.ops.rnn_rows  # noqa: F401  (defines the operator)
from graphopt.analysis.weight_uses import Use
from graphopt.graph import KEPT_META, Graph, value_of
from graphopt.plan.kfac import OUT_IN, Block, Side
from graphopt.rewrite import arguments, emit
from graphopt.size_nodes import Size, Sizes

ROWS = torch.ops.graphopt.rnn_rows.default
_PASSED = (
    "grads",
    "mode",
    "input",
    "hx",
    "params",
    "has_biases",
    "num_layers",
    "bidirectional",
    "batch_first",
)

MakeSide = Callable[[str, int, int], Side]


def rnn_sites(
    uses: dict[str, tuple[Use, ...]], shapes: dict[str, tuple[int, ...]], side: MakeSide
) -> Iterator[tuple[Block, tuple[Use, ...]]]:
    """Blocks of the parameters of `graphopt::rnn`; takes what it covers from `uses`."""
    nodes = {u[0].node: None for u in uses.values() if len(u) == 1 and u[0].kind == "rnn"}
    for node in nodes:
        call = arguments(node)
        if _is_random(call):
            continue
        by_index = {u[0].index: name for name, u in uses.items() if u[0].node is node}
        each = 4 if call["has_biases"] else 2
        for at, index in _weights(call):
            name = by_index.get(index)
            if name is None:
                continue
            bias = ""
            if each == 4:
                wanted = call["wanted"]
                position = _offset(call) + at + 2
                bias_index = sum(wanted[:position])
                bias = by_index.get(bias_index, "") if wanted[position] else ""
            rows, columns = shapes[name]
            use = uses.pop(name)
            uses.pop(bias, None)
            yield (
                Block(
                    "kronecker",
                    name,
                    bias,
                    1,
                    rows,
                    columns,
                    OUT_IN,
                    0,
                    side(f"{name}:G", rows, 1),
                    side(f"{name}:A", columns + bool(bias), 1),
                ),
                use,
            )


def _offset(call: dict[str, Any]) -> int:
    """Position of the first parameter among the tensors of the call."""
    return 1 + len(call["hx"])


def _weights(call: dict[str, Any]) -> Iterator[tuple[int, int]]:
    """Position among the parameters and index among the wanted gradients, of every weight."""
    each = 4 if call["has_biases"] else 2
    for at in range(len(call["params"])):
        position = _offset(call) + at
        if at % each < 2 and call["wanted"][position]:
            yield at, sum(call["wanted"][:position])


def _is_random(call: dict[str, Any]) -> bool:
    projects = call["mode"] == "lstm" and len({value_of(h).shape[-1] for h in call["hx"]}) > 1
    return projects or (call["train"] and call["dropout"] > 0 and call["num_layers"] > 1)


def rnn_count(use: Use, sizes: Sizes) -> Size:
    """Time steps times examples."""
    x = arguments(use.node)["input"]
    return sizes.product((sizes.of(x, 0), sizes.of(x, 1)), use.node)


def rnn_rows(graph: Graph, use: Use) -> tuple[fx.Node, fx.Node]:
    """Rows of output gradients and of inputs of one weight."""
    call = arguments(use.node)
    at = next(at for at, index in _weights(call) if index == use.index)
    each = 4 if call["has_biases"] else 2
    first = 4 * (at // each) + 2 * (at % each)
    passed = [call[name] for name in _PASSED]
    # One call tells the rows of all weights of the network.
    rows = next(
        (n for n in call["input"].users if n.target is ROWS and list(n.args) == passed), None
    ) or emit(graph, ROWS, *passed, like=use.node)
    return _item(graph, rows, first), _item(graph, rows, first + 1)


def _item(graph: Graph, rows: fx.Node, index: int) -> fx.Node:
    item = graph.fx.call_function(getitem, (rows, index))
    item.meta = {key: rows.meta[key] for key in KEPT_META if key in rows.meta}
    item.meta["val"] = value_of(rows)[index]
    return item
