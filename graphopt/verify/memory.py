"""The invariant of memory: an in-place operator may only destroy what nobody reads afterwards.

All views of a memory count as overlapping, whichever parts of it they show.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

from torch import fx
from torch._ops import OpOverload

from graphopt.analysis.aliasing import storage
from graphopt.plan import Role
from graphopt.verify.form import Scan, Violation


def in_place_safe(scan: Scan) -> Iterator[Violation]:
    """Yield in-place calls that overwrite a value which is read later, or an undeclared input."""
    writers = {node: written for node in scan.calls if (written := _written(node))}
    if not writers:
        return
    owner = storage(scan.graph).owner
    holders: dict[fx.Node, list[fx.Node]] = {}
    for node, owning in owner.items():
        holders.setdefault(owning, []).append(node)
    declared = {slot.name for slot in scan.signature.outputs if slot.role is Role.MUTATION}
    slots = dict(zip(scan.placeholders, scan.signature.inputs, strict=True))
    for node, written in writers.items():
        for owning in dict.fromkeys(owner[value] for value in written):
            if owning.op == "get_attr":
                yield node, f"it overwrites the constant {owning.target!r}"
            if owning.op == "placeholder" and slots[owning].name not in declared:
                yield node, f"it overwrites {slots[owning]}, which no mutation output declares"
            yield from _later_reads(scan, node, holders[owning])


def _later_reads(scan: Scan, writer: fx.Node, holders: list[fx.Node]) -> Iterator[Violation]:
    """Reads after `writer` of values that were in the memory before it."""
    now = scan.position[writer]
    for value in holders:
        if scan.position[value] >= now:
            continue
        for user in value.users:
            if scan.position[user] > now:
                yield writer, f"it overwrites {value.name!r}, which {user.name!r} reads later"


def _written(node: fx.Node) -> list[fx.Node]:
    """The arguments that a call overwrites."""
    found: list[fx.Node] = []
    if isinstance(node.target, OpOverload):
        for index, name in _written_parameters(node.target):
            value = node.args[index] if index < len(node.args) else node.kwargs.get(name)
            values = value if isinstance(value, (list, tuple)) else (value,)
            found += [part for part in values if isinstance(part, fx.Node)]
    return found


@cache
def _written_parameters(target: OpOverload) -> tuple[tuple[int, str], ...]:
    return tuple(
        (index, argument.name)
        for index, argument in enumerate(target._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )
