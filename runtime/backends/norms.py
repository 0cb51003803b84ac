"""Running statistics of batch norms, written where they are instead of into copies.

Capture makes a batch norm a function that returns new statistics, which are copied over the old
ones afterwards: four small copies per norm and step. Eager's own kernel writes them while it
normalises, and so does the eager backend, wherever nothing else of the step reads them.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.fx._lazy_graph_module import _LazyGraphModule

from graphopt.plan import Phase, Role, Signature
from graphopt.runtime.engine.halves import Halves, copy_graph

aten = torch.ops.aten
_FUNCTIONAL = aten._native_batch_norm_legit_functional.default
_WRITING = aten._native_batch_norm_legit.default
# Arguments of the norm that are running statistics, and the results that are their new values.
_RUNNING = {3: 3, 4: 4}


def write_statistics(halves: Halves, signature: Signature) -> Halves:
    """Halves whose forward writes statistics and counters of batch norms into the buffers.

    These buffers are no results of the forward any more; `Halves.written` names them.
    """
    graph = copy_graph(halves.forward.graph)
    names = [s.name for s in signature.inputs if s.role is not Role.TANGENT]
    buffers = dict(zip(names, graph.find_nodes(op="placeholder"), strict=True))
    output = graph.output_node()
    returned = list(cast("Sequence[Any]", output.args[0]))
    slots = [s for s in signature.outputs if s.phase is Phase.FORWARD]
    renewed = {buffers[s.name]: returned[i] for i, s in enumerate(slots) if s.role is Role.MUTATION}
    alone = {b: v for b, v in renewed.items() if _only_returned(v, returned)}
    done: set[fx.Node] = set()
    for node in graph.find_nodes(op="call_function", target=_FUNCTIONAL):
        if running := _running(node, alone):
            _write(graph, node)
            done |= running
    counters = [b for b, v in alone.items() if _counts(b, v)]
    done |= set(counters)
    if not done:
        return halves
    kept = [
        i for i, s in enumerate(slots) if s.role is not Role.MUTATION or buffers[s.name] not in done
    ]
    output.args = ((*(returned[i] for i in kept), *returned[len(slots) :]),)
    for value in [renewed[b] for b in done]:
        graph.erase_node(value)
    if counters:
        with graph.inserting_before(output):
            graph.call_function(aten._foreach_add_.Scalar, (counters, 1))
    forward = _LazyGraphModule(halves.forward, graph)
    return replace(
        halves, forward=forward, written=frozenset(n for n, b in buffers.items() if b in done)
    )


def _only_returned(value: Any, returned: Sequence[Any]) -> bool:
    return (
        isinstance(value, fx.Node)
        and [user.op for user in value.users] == ["output"]
        and returned.count(value) == 1
    )


def _running(norm: fx.Node, renewed: Mapping[fx.Node, Any]) -> set[fx.Node]:
    """The statistics of a norm, where only it reads them, and only they get the new ones."""
    found = set()
    for argument, result in _RUNNING.items():
        buffer = norm.args[argument]
        value = renewed.get(cast("fx.Node", buffer))
        if not (
            isinstance(buffer, fx.Node)
            and list(buffer.users) == [norm]
            and norm.args.count(buffer) == 1
            and isinstance(value, fx.Node)
            and value.target is operator.getitem
            and value.args == (norm, result)
        ):
            return set()
        found.add(buffer)
    return found


def _write(graph: fx.Graph, norm: fx.Node) -> None:
    with graph.inserting_before(norm):
        writing = graph.call_function(_WRITING, norm.args, norm.kwargs)
    writing.meta = dict(norm.meta)
    norm.replace_all_uses_with(writing)
    graph.erase_node(norm)


def _counts(buffer: fx.Node, value: fx.Node) -> bool:
    """Whether a single whole number is counted up by one, and nothing reads it."""
    number = buffer.meta.get("val")
    return (
        value.target is aten.add.Tensor
        and value.args == (buffer, 1)
        and not value.kwargs
        and list(buffer.users) == [value]
        and isinstance(number, Tensor)
        and number.dim() == 0
        and number.dtype is torch.int64
    )
