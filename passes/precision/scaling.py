"""Scale the tangents of a backward in float16, and take the scale off its gradients."""

from __future__ import annotations

import torch
from torch import fx

from graphopt.graph import Graph, value_of
from graphopt.passes.precision.problem import is_float32
from graphopt.plan import Phase, Role, Slot
from graphopt.plan.precision import LossScaling
from graphopt.rewrite import emit

_MUL = torch.ops.aten.mul.Tensor
_RECIPROCAL = torch.ops.aten.reciprocal.default
SCALE = "scale"


def scale_gradients(graph: Graph, state: dict[str, torch.Tensor]) -> LossScaling | None:
    """Insert the multiplications; ``None`` where no gradient needs them.

    The scale is a power of two, so that nothing is rounded for it. It is a tensor on the CPU, whose
    value the host knows without waiting for the device.

    Args:
        graph: lowered.
        state: tensors of the pass; gets a scale of 1 unless there is one, which the runtime part
            replaces: what only looks at the graph has tangents that are no loss's.
    """
    tangents = [
        node
        for slot, node in zip(graph.signature.inputs, graph.inputs, strict=True)
        if slot.role is Role.TANGENT and is_float32(value_of(node)) and node.users
    ]
    gradients = {
        node
        for slot, node in zip(graph.signature.outputs, graph.outputs, strict=True)
        if slot.role is Role.GRAD and isinstance(node, fx.Node) and is_float32(value_of(node))
    }
    if not tangents or not gradients:
        return None
    first = state.setdefault(SCALE, torch.ones(()))
    fake = value_of(tangents[0]).new_empty((), device=first.device)
    scale = graph.add_input(Slot(Role.STATE, f"precision/{SCALE}", Phase.BACKWARD), fake)
    _in_backward(scale)
    with graph.fx.inserting_before(_first_user(graph, tangents)):
        inverse = _in_backward(emit(graph, _RECIPROCAL, scale, like=scale))
        for tangent in tangents:
            users = list(tangent.users)
            scaled = _in_backward(emit(graph, _MUL, tangent, scale, like=tangent))
            for user in users:
                user.replace_input_with(tangent, scaled)
    outputs = dict(zip(graph.signature.outputs, graph.outputs, strict=True))
    unscaled: dict[fx.Node, fx.Node] = {}
    for slot, node in outputs.items():
        if slot.role is not Role.GRAD or not is_float32(value_of(node)):
            continue
        if node not in unscaled:
            place = node.next if node.op == "call_function" else graph.output
            with graph.fx.inserting_before(place):
                unscaled[node] = _in_backward(emit(graph, _MUL, node, inverse, like=node))
        outputs[slot] = unscaled[node]
    graph.set_outputs(outputs)
    graph.changed()
    return LossScaling()


def _first_user(graph: Graph, nodes: list[fx.Node]) -> fx.Node:
    users = {user for node in nodes for user in node.users}
    return next(node for node in graph.nodes if node in users)


def _in_backward(node: fx.Node) -> fx.Node:
    node.meta["partitioner_tag"] = "is_backward"
    return node
