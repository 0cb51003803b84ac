"""A backward that adds each gradient to those of earlier micro-batches where it is computed.

Behind the backward, gradients of all layers would have left the caches, and would be read again.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any, cast

import torch
from torch import fx

from graphopt.plan import Role, Slot
from graphopt.runtime.engine.halves import copy_graph
from graphopt.runtime.engine.step import Half

# Under which a step keeps what gradients are added to, by the name of the parameter.
SUM = "partition/sum/{name}"


def adding(half: Half, names: Collection[str], *, in_place: bool) -> Half:
    """The half with sums in place of gradients.

    Args:
        half: a backward half.
        names: parameters whose gradients are added up.
        in_place: whether into the memory of the sums, which compilers do not take.
    """
    graph = copy_graph(half.module.graph)
    output = graph.output_node()
    returned = list(cast("tuple[Any, ...]", output.args[0]))
    last = graph.find_nodes(op="placeholder")[-1:]
    operator = torch.ops.aten.add_.Tensor if in_place else torch.ops.aten.add.Tensor
    sources = list(half.sources)
    for index, slot in enumerate(half.slots):
        gradient = returned[index]
        if not _is_sum(slot, names) or not isinstance(gradient, fx.Node):
            continue
        with graph.inserting_after(last[-1]) if last else graph.inserting_before():
            before = graph.placeholder(f"earlier_gradients_{index}")
        before.meta = dict(gradient.meta)
        last.append(before)
        sources.append(("own", SUM.format(name=slot.name)))
        after = before if gradient.op == "placeholder" else gradient
        with graph.inserting_after(after):
            returned[index] = graph.call_function(operator, (before, gradient))
        returned[index].meta = dict(gradient.meta)
    output.args = (tuple(returned),)
    return replace(half, module=fx.GraphModule(half.module, graph), sources=tuple(sources))


def _is_sum(slot: Slot, names: Collection[str]) -> bool:
    return slot.role is Role.GRAD and slot.name in names
