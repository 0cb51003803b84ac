"""The forms of one backward half: reducing, silent, and reducing what was accumulated.

All are made from the same half, so they take the same saved values. A ``LOCAL`` output marks the
gradient of this rank's own batch; the reduced ``GRAD`` of the same name was computed from it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import fx

from graphopt.plan import Role
from graphopt.runtime.engine.forms import drop_unused
from graphopt.runtime.engine.halves import copy_graph, is_view
from graphopt.runtime.engine.step import Half

c10d = torch.ops._c10d_functional


def reducing(half: Half) -> Half:
    """Returns reduced gradients only."""
    return _returning(half, {})


def silent(half: Half) -> Half:
    """Returns this rank's own gradients and does not communicate."""
    return _returning(half, _locals(half))


def accumulating(half: Half, scale: float, key: Callable[[str], str]) -> Half:
    """Reduces the sum of this batch's gradients and those accumulated before.

    Args:
        half: the half.
        scale: what the tangents are multiplied with, and so also what was accumulated.
        key: under which an accumulated gradient lies in `Step.own`, by its name.

    Returns:
        The half with one more input per reduced gradient.
    """
    copy = fx.GraphModule(half.module, copy_graph(half.module.graph))
    half = replace(half, module=copy)
    graph = copy.graph
    local = _locals(half)
    names = tuple(local)
    last = graph.find_nodes(op="placeholder")
    with graph.inserting_after(last[-1]) if last else graph.inserting_before(None):
        extra = {}
        for name in reversed(names):
            extra[name] = graph.placeholder(f"accumulated_{names.index(name)}")
            extra[name].meta = dict(local[name].meta)
    for name, node in local.items():
        users = list(node.users)
        place = node if node.op != "placeholder" else graph.find_nodes(op="placeholder")[-1]
        with graph.inserting_after(place):
            total = graph.call_function(torch.ops.aten.add.Tensor, (node, extra[name]))
            total.meta = dict(node.meta)
            if scale != 1.0:
                with graph.inserting_before(total):
                    scaled = graph.call_function(torch.ops.aten.mul.Tensor, (extra[name], scale))
                scaled.meta = dict(node.meta)
                total.args = (node, scaled)
        for user in users:
            if user.op != "output":
                user.replace_input_with(node, total)
    sources = (*half.sources, *(("own", key(name)) for name in names))
    return _returning(replace(half, sources=sources), {})


def _locals(half: Half) -> dict[str, fx.Node]:
    outputs = cast("Sequence[fx.Node]", half.module.graph.output_node().args[0])
    return {
        slot.name: node
        for slot, node in zip(half.slots, outputs, strict=True)
        if slot.role is Role.LOCAL
    }


def _returning(half: Half, instead: Mapping[str, fx.Node]) -> Half:
    """A copy whose ``GRAD`` outputs are replaced by name, and without ``LOCAL`` ones."""
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in half.module.graph.nodes:
        if node.op == "output":
            continue
        env[node] = graph.node_copy(node, lambda n: env[n])
    outputs = cast("Sequence[Any]", half.module.graph.output_node().args[0])
    kept = [
        env.get(instead.get(slot.name, node) if slot.role is Role.GRAD else node, node)
        for slot, node in zip(half.slots, outputs, strict=True)
        if slot.role is not Role.LOCAL
    ]
    output = graph.output(tuple(kept))
    output.meta["desc"] = [None] * len(kept)
    drop_unused(graph)
    slots = tuple(slot for slot in half.slots if slot.role is not Role.LOCAL)
    return replace(half, module=fx.GraphModule(half.module, graph), slots=slots)


def reduce_in_place(half: Half) -> Half:
    """Let each all-reduce overwrite its message, where nobody else reads that memory; in place.

    The functional form copies the message first; for gradients of a fast network that copy costs
    as much as everything else about the message (a memory pass per step).
    """
    module = half.module
    users = _readers(module.graph)
    for node in module.graph.find_nodes(op="call_function", target=c10d.all_reduce.default):
        message = node.args[0]
        base = _base(message)
        fresh = base.op == "call_function" and not _aliases_input(base)
        if fresh and users[base] == {node}:
            node.target = c10d.all_reduce_.default
    module.recompile()
    return half


def _base(node: fx.Node) -> fx.Node:
    while is_view(node) or _is_reshape(node):
        node = node.all_input_nodes[0]
    return node


def _is_reshape(node: fx.Node) -> bool:
    return node.target is torch.ops.aten.reshape.default


def _aliases_input(node: fx.Node) -> bool:
    """Whether a value may be the memory of something else; parts of a tuple are not."""
    target = node.target
    if target in (c10d.wait_tensor.default, torch.ops.aten.reshape.default):
        return True
    return isinstance(target, torch._ops.OpOverload) and any(
        r.alias_info is not None for r in target._schema.returns
    )


def _readers(graph: fx.Graph) -> dict[fx.Node, set[fx.Node]]:
    """For every memory the nodes that read it, through any view."""
    readers: dict[fx.Node, set[fx.Node]] = {n: set() for n in graph.nodes}
    for node in graph.nodes:
        if is_view(node) or _is_reshape(node):
            continue
        for used in node.all_input_nodes:
            readers[_base(used)].add(node)
    return readers
