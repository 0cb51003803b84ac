"""Gradients that lie in one memory: those, and only those, that do in eager.

The gradient of a sum is one tensor for all its terms. Whether autograd gives each parameter a copy
of it depends on who else still uses the tensor at that moment, and in-place work on gradients
(clipping, scaling) shows the difference. So autograd itself is asked, on fake tensors, and where it
makes a copy the graph gets one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from graphopt.analysis.aliasing import storage
from graphopt.capture.flat import FlatForward
from graphopt.graph import Graph
from graphopt.plan import Role, Slot


def share_as_in_eager(graph: Graph, flat: FlatForward) -> None:
    """Copy gradients that share memory in the graph and not in eager; changes the graph."""
    if groups := _sharing(graph):
        own = _memories(flat)
        for group in groups:
            together: dict[object, list[int]] = defaultdict(list)
            for index in group:
                name = graph.signature.outputs[index].name
                together[own.get(name, name)].append(index)
            # The largest set keeps the memory; what shares another one in eager gets its own.
            sets = sorted(together.values(), key=len)
            _copy(graph, [index for indices in sets[:-1] for index in indices])


def _sharing(graph: Graph) -> list[list[int]]:
    """Outputs by position whose gradients lie in one memory, where these are several."""
    outputs = list(zip(graph.signature.outputs, graph.outputs, strict=True))
    gradients = [(i, node) for i, (slot, node) in enumerate(outputs) if slot.role is Role.GRAD]
    owner = storage(graph).owner if gradients else {}
    groups: dict[fx.Node, list[int]] = defaultdict(list)
    for index, node in gradients:
        groups[owner[node]].append(index)
    return [group for group in groups.values() if len(group) > 1]


def _memories(flat: FlatForward) -> Mapping[str, int]:
    """Where eager's gradient of each input lies; empty where autograd cannot be asked."""
    mode = flat.context.fake_mode
    assert mode is not None
    leaves = [leaf_of(mode, value) for value in (flat.fakes if flat.symbolic else flat.inputs)]
    try:
        with mode, torch.enable_grad():
            outputs: Sequence[object] = flat.module(*leaves)
            losses = [
                (output * torch.empty_like(output)).sum()
                for output in outputs
                if isinstance(output, Tensor) and output.requires_grad
            ]
            torch.autograd.backward(losses)
    except Exception:
        return {}
    return {
        slot.name: leaf.grad.untyped_storage()._cdata
        for slot, leaf in zip(flat.slots, leaves, strict=True)
        if isinstance(leaf, Tensor) and leaf.grad is not None
    }


def leaf_of(mode: FakeTensorMode, value: Any) -> Any:
    """A fake leaf like an input, real or fake; sizes stay."""
    if not isinstance(value, Tensor):
        return value
    fake = value.detach()
    if not isinstance(value, FakeTensor):
        fake = mode.from_tensor(fake, static_shapes=True)  # symbols would be much slower
    return fake.requires_grad_(value.requires_grad)


def _copy(graph: Graph, indices: Sequence[int]) -> None:
    if not indices:
        return
    outputs: dict[Slot, fx.Node] = dict(zip(graph.signature.outputs, graph.outputs, strict=True))
    copies: dict[fx.Node, fx.Node] = {}
    for index in indices:
        slot = graph.signature.outputs[index]
        value = outputs[slot]
        # Copies of copies: passes that merge equal calls would make one of two copies of a tensor.
        source = copies.get(value, value)
        with graph.fx.inserting_before(graph.output):
            node = graph.fx.call_function(torch.ops.aten.clone.default, (source,))
        node.meta = {**source.meta, "partitioner_tag": "is_backward"}
        with torch.no_grad():
            node.meta["val"] = source.meta["val"].clone()
        outputs[slot] = copies[value] = node
    graph.set_outputs(outputs)
    graph.changed()
