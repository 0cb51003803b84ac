"""Small steps that passes rewrite graphs with."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from graphopt.analysis.fakes import keeping_symbols, unasked
from graphopt.graph import KEPT_META, Graph, value_of


def emit(graph: Graph, target: OpOverload, *args: Any, like: fx.Node, **kwargs: Any) -> fx.Node:
    """Call an operator at the insertion point of ``graph.fx``.

    The node gets the fake value that the operator returns, and everything else that graphopt reads
    from meta (phase, module, checkpoint region) from `like`.
    """
    node = graph.fx.create_node(
        "call_function", target, args, kwargs, name=target.overloadpacket.__name__
    )
    node.meta = {key: like.meta[key] for key in KEPT_META if key in like.meta}
    values = fx.map_arg((args, kwargs), value_of)
    with keeping_symbols(map(value_of, node.all_input_nodes)):
        node.meta["val"] = target(*values[0], **values[1])
    return node


def result_of(node: fx.Node) -> Any:
    """The fake value that an operator returns for its operands in the formats they have now.

    Its geometry is the one that it had, for which the graph holds, so that nothing new is asked of
    a symbol.
    """
    args, kwargs = fx.map_arg((node.args, node.kwargs), value_of)
    with torch.no_grad(), unasked(map(value_of, node.all_input_nodes)):
        return node.target(*args, **kwargs)  # type: ignore[operator]


def parametrized_name(parameter: str, number: int) -> str:
    """How `torch.nn.utils.parametrize` names what takes the place of a parameter."""
    path, _, tensor = parameter.rpartition(".")
    prefix = f"{path}.parametrizations" if path else "parametrizations"
    return f"{prefix}.{tensor}.original{number}"


def arguments(node: fx.Node) -> dict[str, Any]:
    """What a call passes for each parameter of its operator, with defaults filled in."""
    assert isinstance(node.target, OpOverload)
    parameters = node.target._schema.arguments
    given = dict(zip((p.name for p in parameters), node.args, strict=False)) | node.kwargs
    return {p.name: given.get(p.name, p.default_value) for p in parameters}
