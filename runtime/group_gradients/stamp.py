"""The number of the backward pass, in a message that is sent anyway.

Where one rank skips a reduction, later messages pair with those of other passes, of the right size
and wrong in content, and nothing would be said. So one message of each pass has an element more,
and its sum over ranks has to be the number of ranks times this rank's own: small integers, whose
sums are exact in the type of the message.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.errors import RankError
from graphopt.runtime.engine.halves import copy_graph
from graphopt.runtime.engine.step import Half
from graphopt.runtime.ranks.agreement import ranks as named
from graphopt.runtime.ranks.channel import GRACE
from graphopt.runtime.ranks.ranks import Ranks
from graphopt.runtime.ranks.store import StoreLost

aten = torch.ops.aten
c10d = torch.ops._c10d_functional

# Under which the stamp lies in `Step.own`.
KEY = "group_gradients/stamp"
# Passes after which numbers begin again, where the type has room for so many.
LONGEST = 4096


@dataclass(frozen=True)
class Stamp:
    """How one message of a backward is stamped.

    Attributes:
        index: of the message, in the order of sending.
        dtype: of the message.
        size: number of ranks.
        maximum: whether messages are reduced by maximum instead of added.
    """

    index: int
    dtype: torch.dtype
    size: int
    maximum: bool = False

    @property
    def length(self) -> int:
        """Elements at the end of the message."""
        return 2 if self.maximum else 1

    def of(self, passes: int, device: torch.device) -> Tensor:
        """The elements of a pass."""
        value = passes % modulus(self.dtype, self.size)
        return torch.tensor([value, -value][: self.length], dtype=self.dtype, device=device)

    def agrees(self, elements: Tensor, passes: int) -> bool:
        """Whether reduced elements are those of ranks that all are in this pass."""
        value = passes % modulus(self.dtype, self.size)
        found = elements.tolist()
        return bool(found == ([value, -value] if self.maximum else [value * self.size]))


def modulus(dtype: torch.dtype, size: int) -> int:
    """How many different numbers there are whose sums over `size` ranks are exact in a type.

    1 where there is room for none: then all passes look the same.
    """
    rounds = dtype.is_floating_point or dtype.is_complex
    whole = 2 / torch.finfo(dtype).eps if rounds else torch.iinfo(dtype).max
    return max(1, min(LONGEST, int(whole) // size + 1))


def stamped(half: Half, size: int) -> tuple[Half, Stamp | None]:
    """A half whose cheapest message is stamped; ``None`` where it sends nothing.

    Args:
        half: with collectives.
        size: number of ranks.
    """
    graph = copy_graph(half.module.graph)
    sent = graph.find_nodes(op="call_function", target=c10d.all_reduce.default)
    if not sent:
        return half, None
    chosen = min(sent, key=_cost)
    message = chosen.args[0]
    value: Tensor = message.meta["val"]
    stamp = Stamp(sent.index(chosen), value.dtype, size, chosen.args[1] == "max")
    with graph.inserting_after(graph.find_nodes(op="placeholder")[-1]):
        elements = graph.placeholder("stamp")
    elements.meta["val"] = value.new_empty(stamp.length)
    longer = value.new_empty(value.numel() + stamp.length)
    with graph.inserting_before(chosen):
        joins = _joins(message)
        parts = [*message.args[0], elements] if joins else [message, elements]
        joined = _call(graph, longer, aten.cat.default, parts)
    chosen.replace_input_with(message, joined)
    if not message.users:
        graph.erase_node(message)
    chosen.meta["val"] = torch.empty_like(longer)
    for wait in list(chosen.users):
        wait.meta["val"] = torch.empty_like(longer)
        users = list(wait.users)
        with graph.inserting_after(wait):
            body = _call(graph, value, aten.slice.Tensor, wait, 0, 0, value.numel())
        for user in users:
            user.replace_input_with(wait, body)
    module = fx.GraphModule(half.module, graph)
    return replace(half, module=module, sources=(*half.sources, ("own", KEY))), stamp


def _joins(message: fx.Node) -> bool:
    """Whether a message is put together anyway, so that one part more costs nothing."""
    return message.target is aten.cat.default and len(message.args) == 1 and len(message.users) == 1


def _cost(sent: fx.Node) -> tuple[bool, bool, int]:
    """Least for the first maximum, if any: it is sent in steps of accumulated gradients, too."""
    message: Any = sent.args[0]
    if sent.args[1] == "max":
        return False, False, 0
    return True, not _joins(message), math.prod(message.meta["val"].shape)


def _call(graph: fx.Graph, value: Tensor, target: Any, *args: Any) -> fx.Node:
    node = graph.call_function(target, args)
    node.meta["val"] = value
    return node


def slipped(ranks: Ranks, passes: int) -> RankError:
    """Which ranks are in which backward pass, as far as they say; called on all that find it out.

    Args:
        ranks: all of them.
        passes: number of the pass in which this rank is.
    """
    agreement, topic = ranks.group.agreement, "slipped"
    where = {passes: [agreement.rank]}
    try:
        absent = agreement.missing(topic, str(passes), GRACE)
        for rank in range(ranks.size):
            if rank != agreement.rank and rank not in absent:
                where.setdefault(int(agreement.store.get(f"{topic}/{rank}")), []).append(rank)
    except StoreLost:
        pass  # what this rank knows is worth an error
    parts = [
        f"{named(sorted(members))} {'are' if len(members) > 1 else 'is'} in backward pass {number}"
        for number, members in sorted(where.items(), key=lambda item: min(item[1]))
    ]
    if len(parts) == 1:
        parts.append("another rank is in another one")
    return RankError(
        f"gradients of different steps were added up: {', '.join(parts)}",
        hint="make as many backward passes on every rank, with no_sync() around the same ones; the "
        "gradients of this step are not usable",
    )
