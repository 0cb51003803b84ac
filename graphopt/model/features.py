"""Outputs from which other outputs are computed: their own gradients are inside of the graph.

Eager accumulates the gradient of such an intermediate value before it goes on; a captured step
hands over parameters' and inputs' gradients only. What is asked of an intermediate is refused by
name, because what came out would lack what the other outputs contribute.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.errors import IntermediateGradientError
from graphopt.graph import Graph
from graphopt.plan import Role

# Outputs that share memory in eager are clones of one value in the graph.
_SAME = frozenset((torch.ops.aten.clone.default, torch.ops.aten.view.default))


def features_of(graph: Graph) -> tuple[int, ...]:
    """Positions of the outputs from which another output with a gradient is computed."""
    tangents = set(graph.signature.names(Role.TANGENT))
    outputs = {
        int(slot.name): node
        for slot, node in zip(graph.signature.outputs, graph.outputs, strict=True)
        if slot.role is Role.OUTPUT and slot.name in tangents
    }
    if len(outputs) < 2:
        return ()
    found = set()
    values = {position: _value(node) for position, node in outputs.items()}
    for other, end in outputs.items():
        needed = _ancestors(end)
        found |= {p for p, value in values.items() if p != other and value in needed}
    return tuple(sorted(found))


def _value(node: fx.Node) -> fx.Node:
    """What an output is, without the copies and views that it was made by."""
    while node.op == "call_function" and node.target in _SAME:
        node = node.all_input_nodes[0]
    return node


def _ancestors(node: fx.Node) -> set[fx.Node]:
    seen, queue = {node}, [node]
    while queue:
        for earlier in queue.pop().all_input_nodes:
            if earlier not in seen:
                seen.add(earlier)
                queue.append(earlier)
    return {n for n in seen if n.op != "placeholder"}


def watched(
    engine: Callable[..., Sequence[Any]], features: Sequence[int]
) -> Callable[..., Sequence[Any]]:
    """The engine; a backward through its outputs refuses what it cannot give."""
    if not features:
        return engine

    def run(inputs: Sequence[Tensor]) -> Sequence[Any]:
        outputs = engine(inputs)
        found = [outputs[i] for i in features]
        if found[0].grad_fn is not None:
            references = [weakref.ref(tensor) for tensor in found]
            # Before any hook of the user's, which would be given no gradient.
            found[0].register_hook(lambda _: _check(references))
        return outputs

    return run


def _check(references: Sequence[weakref.ref[Tensor]]) -> None:
    first = references[0]()
    for reference in references:
        tensor = reference()
        if tensor is None:
            continue
        own = tensor is first  # some outputs are one tensor
        if tensor.retains_grad or len(tensor._backward_hooks or ()) > own:
            asked = "retain_grad" if tensor.retains_grad else "register_hook"
            raise IntermediateGradientError(
                f"{asked} was called on an output of shape {list(tensor.shape)} from which another "
                "output is computed, and its gradient is inside of the captured step",
                hint="add zeros that require a gradient to the value in forward: their gradient is "
                "the one of the value",
            )


def note(features: Sequence[int]) -> tuple[str, ...]:
    """What is reported about them."""
    if not features:
        return ()
    which = ", ".join(map(str, features))
    return (
        f"of what forward returns and stores, tensor {which} is an intermediate value of another "
        "one: retain_grad, register_hook and autograd.grad on it are refused",
    )
