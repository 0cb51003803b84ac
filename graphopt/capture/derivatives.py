"""Derivatives that forward takes: by ``torch.autograd.grad``, and in forward mode.

What is differentiated may depend on a leaf of forward's own (``x.detach().requires_grad_()``).
AOTAutograd differentiates a graph with respect to its inputs only, so such a leaf may not come out
of the graph; what also depends on inputs or parameters may.

Forward mode has zeros without memory for tangents of what does not change. Eager gives them memory
where an operator cannot do without, and so does the trace, except where a backward reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NoReturn
from unittest import mock

import torch
import torch._dynamo
from torch import Tensor
from torch._dynamo.exc import unimplemented
from torch._dynamo.output_graph import OutputGraph
from torch._dynamo.variables.tensor import TensorVariable

from graphopt.graph import Graph


@contextmanager
def derivatives_inside() -> Iterator[None]:
    """While Dynamo captures; everything is put back on leaving. Older versions of torch refuse."""
    with ExitStack() as stack:
        if hasattr(torch._dynamo.config, "trace_autograd_ops"):
            stack.enter_context(torch._dynamo.config.patch(trace_autograd_ops=True))
            stack.enter_context(mock.patch.object(TensorVariable, "method_backward", _backward))
        check = "_check_requires_grad_intermediate_outputs"
        if original := getattr(OutputGraph, check, None):
            stack.enter_context(mock.patch.object(OutputGraph, check, _only_of_leaves(original)))
        yield


def zeros_with_memory(graph: Graph) -> None:
    """Give memory to zeros of forward mode that are left: they are saved or folded like others."""
    zeros = torch.ops.aten._efficientzerotensor.default
    for node in graph.fx.find_nodes(op="call_function", target=zeros):
        node.target = torch.ops.aten.zeros.default
        with torch.no_grad():
            node.meta["val"] = node.meta["val"].clone()
        graph.changed()


def _backward(self: Any, *_: object, **__: object) -> NoReturn:
    unimplemented(
        gb_type="Unsupported Tensor.backward() call",
        context=str(self),
        explanation="It would add to the gradients of parameters before the backward of the call.",
        hints=[],
    )


def _only_of_leaves(original: Callable[..., None]) -> Callable[..., None]:
    """Dynamo's check of outputs that depend on leaves of forward, for those that must not."""

    def check(self: Any, outputs: list[Any], tx: Any) -> None:
        own = {id(_example(leaf)) for leaf in self.leaf_var_creation_order if not leaf.source}
        refused = [
            one
            for one in outputs
            if isinstance(one, TensorVariable) and not _leaves_of(_example(one)) - own
        ]
        original(self, refused, tx)

    return check


def _example(variable: Any) -> Tensor:
    value: Tensor = variable.as_proxy().node.meta["example_value"]
    return value


def _leaves_of(value: Tensor) -> set[int]:
    """Identities of the leaves that a gradient of ``value`` reaches."""
    found: set[int] = set()
    seen: set[Any] = set()
    waiting = [value.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (leaf := getattr(node, "variable", None)) is not None:
            found.add(id(leaf))
        waiting += (function for function, _ in node.next_functions)
    return found
