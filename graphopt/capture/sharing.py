"""Inputs of one call that share memory, where forward writes to it.

A graph is a function of separate tensors. Where a write to one input shows in another (a slice of a
bank, overlapping windows, a buffer and a view of it), both become views of one input that stands
for their memory.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from graphopt.capture.flat import FlatForward
from graphopt.capture.plainly import Declined
from graphopt.errors import CaptureError
from graphopt.plan import Role, Slot

Inputs = Callable[[Sequence[Tensor]], Sequence[Tensor]]


@dataclass(frozen=True)
class _Memory:
    """Inputs by position that lie in one storage; one of them may be all of it."""

    members: tuple[int, ...]
    whole: int | None
    size: int

    def of(self, inputs: Sequence[Tensor]) -> Tensor:
        """The storage as one tensor, with the version counter of its members."""
        if self.whole is not None:
            return inputs[self.whole]
        with torch.no_grad():
            return inputs[self.members[0]].as_strided((self.size,), (1,), 0)


def on_memories(flat: FlatForward) -> tuple[FlatForward, Inputs]:
    """The same forward with one input for all inputs that share a storage, and what makes those.

    Raises:
        CaptureError: that cannot be; names the inputs.
    """
    memories = [_memory(flat, members) for members in _sharing(flat.inputs)]
    inside = {i: memory for memory in memories for i in memory.members}
    kept = [i for i in range(len(flat.inputs)) if i not in inside]

    def inputs_of(inputs: Sequence[Tensor]) -> list[Tensor]:
        return [*(inputs[i] for i in kept), *(memory.of(inputs) for memory in memories)]

    joined = replace(
        flat,
        module=_rewritten(flat, kept, memories),
        slots=(*(flat.slots[i] for i in kept), *(_slot(flat, memory) for memory in memories)),
        inputs=tuple(inputs_of(flat.inputs)),
    )
    return joined, inputs_of


def _sharing(inputs: Sequence[Tensor]) -> list[tuple[int, ...]]:
    storages: dict[int, list[int]] = defaultdict(list)
    for index, tensor in enumerate(inputs):
        if tensor.layout is torch.strided and not tensor.requires_grad:
            storages[tensor.untyped_storage()._cdata].append(index)
    return [tuple(members) for members in storages.values() if len(members) > 1]


def _memory(flat: FlatForward, members: tuple[int, ...]) -> _Memory:
    tensors = [flat.inputs[i] for i in members]
    size = tensors[0].untyped_storage().nbytes() // tensors[0].element_size()
    if len({t.dtype for t in tensors}) > 1:
        raise refusal([flat.slots[i] for i in members])
    whole = (
        i
        for i, t in zip(members, tensors, strict=True)
        if t.is_contiguous() and t.storage_offset() == 0 and t.numel() == size
    )
    return _Memory(members, next(whole, None), size)


def _slot(flat: FlatForward, memory: _Memory) -> Slot:
    if memory.whole is not None:
        return flat.slots[memory.whole]
    return Slot(Role.INPUT, "memory_of_" + "_and_".join(flat.slots[i].name for i in memory.members))


def _rewritten(
    flat: FlatForward, kept: Sequence[int], memories: Sequence[_Memory]
) -> fx.GraphModule:
    """A copy whose placeholders are the inputs that stay, then the memories."""
    placeholders = flat.module.graph.find_nodes(op="placeholder")
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for index in kept:
        env[placeholders[index]] = graph.node_copy(placeholders[index])
    bases = [graph.placeholder(f"memory_{number}") for number in range(len(memories))]
    for memory, base in zip(memories, bases, strict=True):
        for index in memory.members:
            tensor = flat.inputs[index]
            geometry = (tuple(tensor.shape), tensor.stride(), tensor.storage_offset())
            view = graph.call_function(torch.as_strided, (base, *geometry))
            env[placeholders[index]] = base if index == memory.whole else view
    for node in flat.module.graph.nodes:
        if node.op != "placeholder":
            env[node] = graph.node_copy(node, lambda n: env[n])
    return fx.GraphModule(flat.module, graph)


def refusal(slots: Sequence[Slot]) -> CaptureError:
    """What to say where it is not possible."""
    names = ", ".join(str(slot) for slot in slots)
    return CaptureError(
        f"forward changes an input in place that shares memory with another: {names}",
        hint="pass a clone of one of them",
    )


# -- whether a call has its inputs arranged as the captured one ------------------------------------


def arrangement(tensors: Sequence[Tensor], positions: Sequence[int]) -> tuple[int, ...]:
    """For each of these tensors the first one with the same storage."""
    first: dict[int, int] = {}
    strided = torch.strided
    return tuple(
        first.setdefault(tensors[i].untyped_storage()._cdata, i)
        if tensors[i].layout is strided
        else i
        for i in positions
    )


def watched(slots: Sequence[Slot], mutated: Collection[str]) -> tuple[int, ...]:
    """Inputs by position whose arrangement matters: those that forward writes to, and arguments.

    Which storages the parameters and buffers of a model lie in does not change from call to call.
    """
    if not mutated or all(slot.role is not Role.INPUT for slot in slots):
        return ()
    return tuple(i for i, s in enumerate(slots) if s.role is Role.INPUT or s.name in mutated)


def prepared(
    slots: Sequence[Slot],
    inputs: Sequence[Tensor],
    positions: Sequence[int],
    change: Inputs | None = None,
    alone: Sequence[int] = (),
) -> Inputs:
    """From the tensors of a call to those of the graph.

    What it returns raises `Declined` for a call whose tensors share memory in another way.

    Args:
        slots: names of the inputs.
        inputs: of the captured call.
        positions: inputs whose arrangement matters.
        change: makes the inputs of the graph of those of the call; none where they are the same.
        alone: inputs that must not share memory with any tensor, in the captured call neither.

    Raises:
        CaptureError: an input that has to be alone is not.
    """
    for i in alone:
        if not _alone(inputs[i]):
            raise CaptureError(
                f"forward assigns to the `.data` of {slots[i]}, and another tensor has its memory",
                hint="change it in place: with torch.no_grad(): tensor.copy_(…)",
            )
    expected = arrangement(inputs, positions)
    apart = expected == positions
    given = [i for i in positions if slots[i].role is Role.INPUT]

    def prepare(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        if (
            given
            and not (apart and all(_alone(tensors[i]) for i in given))
            and arrangement(tensors, positions) != expected
        ):
            raise Declined("its inputs share memory in another way")
        if not all(_alone(tensors[i]) for i in alone):
            raise Declined(
                "forward assigns to the `.data` of a tensor whose memory another one has"
            )
        return tensors if change is None else change(tensors)

    return prepare


def _alone(tensor: Tensor) -> bool:
    """Whether certainly no other tensor lies in this one's storage."""
    if tensor.layout is not torch.strided:
        return True
    # One use is the tensor's, one that of the Python object which is asked here.
    return bool(torch._C._storage_Use_Count(tensor.untyped_storage()._cdata) <= 2)
