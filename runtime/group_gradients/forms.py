"""The forms of one backward half: reducing, silent, and reducing what was accumulated.

All are made from the same half, so they take the same saved values. A ``LOCAL`` output marks the
gradient of this rank's own batch; the reduced ``GRAD`` of the same name was computed from it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import fx

from graphopt.plan import Phase, Role, Signature, Slot
from graphopt.runtime.engine.partition import copy_graph, is_view

c10d = torch.ops._c10d_functional


def backward_slots(signature: Signature) -> tuple[Slot, ...]:
    """Output slots of the backward half, ``LOCAL`` ones included."""
    return tuple(s for s in signature.outputs if s.phase is Phase.BACKWARD)


def reducing(backward: fx.GraphModule, slots: Sequence[Slot]) -> fx.GraphModule:
    """Returns reduced gradients only."""
    return _returning(backward, slots, {})


def silent(backward: fx.GraphModule, slots: Sequence[Slot]) -> fx.GraphModule:
    """Returns this rank's own gradients and does not communicate."""
    return _returning(backward, slots, _locals(backward.graph, slots))


def accumulating(
    backward: fx.GraphModule, slots: Sequence[Slot], scale: float
) -> tuple[fx.GraphModule, tuple[str, ...]]:
    """Reduces the sum of this batch's gradients and those accumulated before.

    Args:
        backward: the half.
        slots: its outputs.
        scale: what the tangents are multiplied with, and so also what was accumulated.

    Returns:
        The half with one more input per reduced gradient, and the parameters' names in order.
    """
    copy = fx.GraphModule(backward, copy_graph(backward.graph))
    graph = copy.graph
    local = _locals(graph, slots)
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
    return _returning(copy, slots, {}), names


def with_outputs(backward: fx.GraphModule, kept: Sequence[bool]) -> fx.GraphModule:
    """A copy that returns and computes some of the outputs only."""
    copy = fx.GraphModule(backward, copy_graph(backward.graph))
    output = copy.graph.output_node()
    values = cast("Sequence[Any]", output.args[0])
    output.args = (tuple(v for v, keep in zip(values, kept, strict=True) if keep),)
    output.meta["desc"] = [None] * len(output.args[0])
    copy.graph.eliminate_dead_code(lambda n: n.op in ("placeholder", "output") or _random(n))
    copy.recompile()
    return copy


def _locals(graph: fx.Graph, slots: Sequence[Slot]) -> dict[str, fx.Node]:
    outputs = cast("Sequence[fx.Node]", graph.output_node().args[0])
    return {
        slot.name: node
        for slot, node in zip(slots, outputs, strict=True)
        if slot.role is Role.LOCAL
    }


def _returning(
    backward: fx.GraphModule, slots: Sequence[Slot], instead: Mapping[str, fx.Node]
) -> fx.GraphModule:
    """A copy whose ``GRAD`` outputs are replaced by name, and without ``LOCAL`` ones."""
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in backward.graph.nodes:
        if node.op == "output":
            continue
        env[node] = graph.node_copy(node, lambda n: env[n])
    outputs = cast("Sequence[Any]", backward.graph.output_node().args[0])
    kept = [
        env.get(instead.get(slot.name, node) if slot.role is Role.GRAD else node, node)
        for slot, node in zip(slots, outputs, strict=True)
        if slot.role is not Role.LOCAL
    ]
    output = graph.output(tuple(kept))
    output.meta["desc"] = [None] * len(kept)
    # A collective whose result nobody wants must not run: the others would wait for ever.
    graph.eliminate_dead_code(lambda n: n.op in ("placeholder", "output") or _random(n))
    return fx.GraphModule(backward, graph)


def _random(node: fx.Node) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and (
        torch.Tag.nondeterministic_seeded in target.tags
    )


def reduce_in_place(module: fx.GraphModule) -> fx.GraphModule:
    """Let each all-reduce overwrite its message, where nobody else reads that memory.

    The functional form copies the message first; for gradients of a fast network that copy costs
    as much as everything else about the message (a memory pass per step).
    """
    users = _readers(module.graph)
    for node in module.graph.find_nodes(op="call_function", target=c10d.all_reduce.default):
        message = node.args[0]
        base = _base(message)
        fresh = base.op == "call_function" and not _aliases_input(base)
        if fresh and users[base] == {node}:
            node.target = c10d.all_reduce_.default
    module.recompile()
    return module


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
