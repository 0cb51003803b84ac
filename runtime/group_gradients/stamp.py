"""The number of the backward pass, in a message that is sent anyway.

Where one rank skips a reduction, later messages pair with those of other passes, of the right size
and wrong in content, and nothing would be said. So one message of each pass has an element more,
and its sum over ranks has to be the number of ranks times this rank's own: small integers, whose
sums are exact in the type of the message. Where so many ranks have no room in one element, each has
its number in one of several. The loss scale goes into the number, too, as gradients of different
scales must not be added up, either.
"""

from __future__ import annotations

import math
import struct
import zlib
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.runtime.engine.halves import copy_graph
from graphopt.runtime.engine.step import Half
from graphopt.runtime.ranks.ranks import Ranks

aten = torch.ops.aten
c10d = torch.ops._c10d_functional

# Under which the stamp lies in `Step.own`.
KEY = "group_gradients/stamp"
# Passes after which numbers begin again, where the type has room for so many.
LONGEST = 4096
# So many numbers are told apart at least.
LEAST = 16


@dataclass(frozen=True)
class Stamp:
    """How one message of a backward is stamped.

    Attributes:
        index: of the message, in the order of sending.
        dtype: of the message.
        size: number of ranks.
        rank: this one.
        maximum: whether messages are reduced by maximum instead of added.
    """

    index: int
    dtype: torch.dtype
    size: int
    rank: int
    maximum: bool = False

    @cached_property
    def sharing(self) -> int:
        """How many ranks have their number in one element."""
        return max(1, min(self.size, _largest(self.dtype) // (LEAST - 1)))

    @cached_property
    def modulus(self) -> int:
        """How many numbers there are whose sums are exact."""
        return max(1, min(LONGEST, _largest(self.dtype) // self.sharing + 1))

    @cached_property
    def length(self) -> int:
        """Elements at the end of the message."""
        return 2 if self.maximum else -(-self.size // self.sharing)

    def of(self, number: int, device: torch.device) -> Tensor:
        """The elements of a number."""
        value = number % self.modulus
        if self.length == 1:
            return torch.tensor([value], dtype=self.dtype, device=device)
        elements = [0] * self.length
        if self.maximum:
            elements = [value, -value]
        else:
            elements[self.rank // self.sharing] = value
        return torch.tensor(elements, dtype=self.dtype, device=device)

    def agrees(self, elements: Tensor, number: int) -> bool:
        """Whether reduced elements are those of ranks that all have this number."""
        value = number % self.modulus
        found: list[float] = elements.tolist()
        if self.maximum:
            return found == [value, -value]
        last = self.size - (self.length - 1) * self.sharing
        return found == [value * self.sharing] * (self.length - 1) + [value * last]


def numbered(passes: int, scale: float) -> int:
    """The number of a backward pass whose loss was multiplied with a scale."""
    return passes if scale == 1.0 else passes + zlib.crc32(struct.pack("<d", scale))


def _largest(dtype: torch.dtype) -> int:
    """The whole number up to which a type has all of them."""
    rounds = dtype.is_floating_point or dtype.is_complex
    return int(2 / torch.finfo(dtype).eps) if rounds else torch.iinfo(dtype).max


def stamped(half: Half, ranks: Ranks) -> tuple[Half, Stamp | None]:
    """A half whose cheapest message is stamped; ``None`` where it sends nothing.

    Args:
        half: with collectives.
        ranks: that take part.
    """
    graph = copy_graph(half.module.graph)
    sent = graph.find_nodes(op="call_function", target=c10d.all_reduce.default)
    if not sent:
        return half, None
    chosen = min(sent, key=_cost)
    message = chosen.args[0]
    value: Tensor = message.meta["val"]
    maximum = chosen.args[1] == "max"
    stamp = Stamp(sent.index(chosen), value.dtype, ranks.size, ranks.group.rank(), maximum)
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
