"""Weights that forward changes where autograd does not see it: clipping, normalising, `max_norm`.

Under `no_grad` or by `.data`, a change is no part of what is differentiated: the gradient of a
trained parameter is the one of its new value. AOTAutograd knows changes under `no_grad`, so those
by `.data` are put there; and it gives each changed value a tangent, which nobody has.

``w.data = value`` gives a tensor another memory. Where that memory is new and nobody else has the
old one, writing the values into the old one is the same.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch._functorch._aot_autograd.descriptors import InputMutationAOTOutput, TangentAOTInput
from torch.nn import functional

from graphopt.capture.flat import FlatForward

_ADD = torch.ops.aten.add.Tensor
_AUTOGRAD: Any = torch._C._autograd
_DETACHING = ("detach", _AUTOGRAD._get_data_attr)
_IN_PLACE = frozenset(
    name for name in dir(operator) if name.startswith("i") and f"__{name}__" in dir(operator)
) | {"setitem"}


def without_gradients(flat: FlatForward) -> FlatForward:
    """The forward whose changes by `.data` are under `no_grad`, in place.

    Its `alone` are the inputs whose memory nobody else may have.
    """
    graph = flat.module.graph
    _renorm_before(graph)
    alone = tuple(_assigned(graph, flat.inputs))
    trained = {_memory(n) for n in graph.find_nodes(op="placeholder") if _requires_grad(n)}
    enabled = torch.is_grad_enabled()
    for node in list(graph.nodes):
        if node.target is torch._C._set_grad_enabled:
            enabled = bool(node.args[0])
        elif enabled and node.op.startswith("call") and _hidden(node, trained):
            with graph.inserting_before(node):
                graph.call_function(torch._C._set_grad_enabled, (False,))
            with graph.inserting_after(node):
                graph.call_function(torch._C._set_grad_enabled, (True,))
    flat.module.recompile()
    if not alone:
        return flat
    why = "forward assigns to the `.data` of a tensor"
    return replace(flat, alone=alone, description=lambda: why)


def _renorm_before(graph: fx.Graph) -> None:
    """Have embeddings with `max_norm` change their weight by an operator of its own."""
    for node in list(graph.nodes):
        if node.target not in (functional.embedding, functional.embedding_bag):
            continue
        bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)
        given = bound.arguments
        weight = given["weight"]
        norm = given.get("max_norm"), given.get("norm_type", 2.0)
        if norm[0] is None or (value := _value(weight)) is None:
            continue
        given["max_norm"] = None
        with graph.inserting_before(node):
            detached = graph.call_method("detach", (weight,))
            tokens = graph.call_method("contiguous", (given["input"],))
            changed = graph.call_function(torch.embedding_renorm_, (detached, tokens, *norm))
        tokens.meta = {"example_value": _value(given["input"])}
        detached.meta = {"example_value": value.detach()}
        changed.meta = node.meta | detached.meta
        node.args, node.kwargs = bound.args, bound.kwargs


def _hidden(node: fx.Node, trained: set[int | None]) -> bool:
    """Whether an operator on tensors without gradient writes to the memory of trained ones."""
    if not writes_in_place(node) or _requires_grad(node):
        return False
    tensors = node.all_input_nodes
    written = node.args[0]
    return _memory(written) in trained and not any(map(_requires_grad, tensors))


def _assigned(graph: fx.Graph, inputs: Sequence[Any]) -> Iterator[int]:
    """Write the values of ``w.data = value`` into `w` where that is the same."""
    places = {node: i for i, node in enumerate(graph.find_nodes(op="placeholder"))}
    detached: dict[tuple[object, int | None], None] = {}
    for node in list(graph.nodes):
        if node.target in _DETACHING and node.args:
            detached[node.args[0], _memory(node)] = None
        if node.target is not torch.Tensor.set_ or len(node.args) != 2:
            continue
        changed, value = node.args
        if changed not in places or not isinstance(value, fx.Node):
            continue
        if _geometry(inputs[places[changed]]) != _geometry(_value(value)):
            continue
        itself = (changed, _memory(value)) in detached
        # The stand-in of `changed` has been given the memory of `value` by now.
        memories = {_memory(other) for other in places if other is not changed}
        shared = _memory(value) in memories or _written(graph, _memory(value), after=node)
        if shared and not itself:
            continue
        lowered = [user for user in node.users if not user.users]
        if len(lowered) != len(node.users):
            continue
        for user in lowered:  # of the version counter
            graph.erase_node(user)
        if not itself:  # as it is after `w.data *= 0.9`
            with graph.inserting_before(node):
                graph.call_method("copy_", (changed, value)).meta = node.meta
            yield places[changed]
        graph.erase_node(node)


def _written(graph: fx.Graph, memory: int | None, *, after: fx.Node) -> bool:
    """Whether a memory is written to behind an operator, or leaves the graph."""
    nodes = list(graph.nodes)
    behind = nodes[nodes.index(after) + 1 :]
    written = (n.args[0] for n in behind if writes_in_place(n))
    return memory in map(_memory, (*written, *graph.output_node().all_input_nodes))


def writes_in_place(node: fx.Node) -> bool:
    """Whether an operator of a torch-level graph writes into its first argument."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if node.op not in ("call_function", "call_method") or not node.args:
        return False
    return name in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))


def drop_tangents(joint: fx.GraphModule) -> None:
    """Take out the tangents of values that were written where autograd does not see it.

    They are added to the gradient of the input alone; others stay.
    """
    for node in joint.graph.find_nodes(op="placeholder"):
        desc = node.meta["desc"]
        if isinstance(desc, TangentAOTInput) and isinstance(desc.output, InputMutationAOTOutput):
            _drop(joint.graph, node)
    joint.recompile()


def _drop(graph: fx.Graph, tangent: fx.Node) -> None:
    output = graph.output_node()
    if any(user is not output and user.target is not _ADD for user in tangent.users):
        return
    for user in list(tangent.users):
        if user is output:
            (returned,) = output.args
            assert isinstance(returned, Iterable)
            output.args = (tuple(None if n is tangent else n for n in returned),)
        else:
            (other,) = (n for n in user.all_input_nodes if n is not tangent)
            user.replace_all_uses_with(other)
            graph.erase_node(user)
    graph.erase_node(tangent)


def _value(node: object) -> Tensor | None:
    value = node.meta.get("example_value") if isinstance(node, fx.Node) else None
    return value if isinstance(value, Tensor) else None


def _requires_grad(node: object) -> bool:
    value = _value(node)
    return value is not None and value.requires_grad


def _memory(node: object) -> int | None:
    value = _value(node)
    if value is None or value.layout is not torch.strided:
        return None
    try:
        memory: int = value.untyped_storage()._cdata
    except NotImplementedError:  # a value within a transform of torch.func has none
        return None
    return memory


def _geometry(value: Tensor | None) -> object:
    if value is None or value.layout is not torch.strided:
        return object()  # equal to no other
    return tuple(value.shape), value.stride(), value.storage_offset(), value.dtype, value.device
