"""Other forms of a half: copies that return, and so compute, some of its outputs only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import fx

from graphopt.plan import Slot
from graphopt.runtime.engine.halves import copy_graph
from graphopt.runtime.engine.step import Half


def keeping(half: Half, wanted: Callable[[Slot], bool]) -> Half:
    """The half with the outputs whose slots are wanted; a forward keeps its saved values."""
    kept = [wanted(slot) for slot in half.slots]
    if all(kept):
        return half
    copy = fx.GraphModule(half.module, copy_graph(half.module.graph))
    output = copy.graph.output_node()
    values = list(cast("Sequence[Any]", output.args[0]))
    count = len(half.slots)
    returned = [v for v, keep in zip(values[:count], kept, strict=True) if keep] + values[count:]
    output.args = (tuple(returned),)
    output.meta["desc"] = [None] * len(returned)
    drop_unused(copy.graph)
    copy.recompile()
    slots = tuple(s for s, keep in zip(half.slots, kept, strict=True) if keep)
    return replace(half, module=copy, slots=slots)


def drop_unused(graph: fx.Graph) -> None:
    """Remove what no output needs, except what draws random numbers or checks.

    A collective whose result nobody wants must not run, or the other ranks would wait for ever; a
    random number must be drawn, or those after it would be others; what returns nothing is called
    because it may raise.
    """
    graph.eliminate_dead_code(
        lambda n: n.op in ("placeholder", "output") or _random(n) or _checks(n)
    )


def _checks(node: fx.Node) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and not target._schema.returns


def _random(node: fx.Node) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and (
        torch.Tag.nondeterministic_seeded in target.tags
    )
