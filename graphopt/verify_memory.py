"""The invariant of memory: an in-place operator may only destroy what nobody reads afterwards.

Storage is followed through views by the alias annotations of operator schemas. Where these do not
say which part of a storage a view covers, all views of it count as overlapping.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from functools import cache

from torch import fx
from torch._ops import OpOverload

from graphopt.plan import Role
from graphopt.verify_form import Scan, Violation

# These return their argument, or a view of it, and their schemas do not say so.
_HIDDEN_VIEWS = frozenset({"aten::_unsafe_view", "_c10d_functional::wait_tensor"})

# A storage: the node that allocates it, and which of the node's results it holds.
_Storage = tuple[fx.Node, object]


def in_place_safe(scan: Scan) -> Iterator[Violation]:
    """Yield in-place calls that overwrite a value which is read later, or an undeclared input."""
    mutators = [n for n in scan.calls if isinstance(n.target, OpOverload) and _written(n.target)]
    if not mutators:
        return
    storages = _storages(scan)
    holders: dict[_Storage, list[fx.Node]] = {}
    for node, kept in storages.items():
        for storage in kept:
            holders.setdefault(storage, []).append(node)
    declared = {slot.name for slot in scan.signature.outputs if slot.role is Role.MUTATION}
    slots = dict(zip(scan.placeholders, scan.signature.inputs, strict=True))
    for node in mutators:
        for storage in _overwritten(node, storages):
            owner = storage[0]
            if owner.op == "get_attr":
                yield node, f"it overwrites the constant {owner.target!r}"
            if owner.op == "placeholder" and slots[owner].name not in declared:
                yield node, f"it overwrites {slots[owner]}, which no mutation output declares"
            yield from _later_reads(scan, node, holders[storage])


def _later_reads(scan: Scan, mutator: fx.Node, holders: list[fx.Node]) -> Iterator[Violation]:
    """Reads after `mutator` of values that were in the storage before it."""
    now = scan.position[mutator]
    for value in holders:
        if scan.position[value] >= now:
            continue
        for user in value.users:
            if scan.position[user] > now:
                yield mutator, f"it overwrites {value.name!r}, which {user.name!r} reads later"


def _overwritten(node: fx.Node, storages: dict[fx.Node, frozenset[_Storage]]) -> set[_Storage]:
    return {
        storage
        for value in _arguments(node, _written(node.target))
        for storage in storages.get(value, ())
    }


def _storages(scan: Scan) -> dict[fx.Node, frozenset[_Storage]]:
    """Which storages each value may live in."""
    found: dict[fx.Node, frozenset[_Storage]] = {}
    for node in scan.nodes:
        shared = _aliased(node)
        if node.target is operator.getitem and found[shared[0]] == {(shared[0], None)}:
            found[node] = frozenset({(shared[0], node.args[1])})
        elif shared:
            found[node] = frozenset().union(*(found[value] for value in shared))
        else:
            found[node] = frozenset({(node, None)})
    return found


def _aliased(node: fx.Node) -> list[fx.Node]:
    """The arguments whose storage the result of a node may share."""
    if node.target is operator.getitem:
        return node.all_input_nodes
    if isinstance(node.target, OpOverload):
        return _arguments(node, _shared(node.target))
    return []


def _arguments(node: fx.Node, names: tuple[tuple[int, str], ...]) -> list[fx.Node]:
    found: list[fx.Node] = []
    for index, name in names:
        value = node.args[index] if index < len(node.args) else node.kwargs.get(name)
        values = value if isinstance(value, (list, tuple)) else (value,)
        found += [part for part in values if isinstance(part, fx.Node)]
    return found


@cache
def _written(target: OpOverload) -> tuple[tuple[int, str], ...]:
    """Index and name of the arguments that an operator overwrites."""
    return tuple(
        (index, argument.name)
        for index, argument in enumerate(target._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )


@cache
def _shared(target: OpOverload) -> tuple[tuple[int, str], ...]:
    """Index and name of the arguments whose storage an operator's results may share."""
    schema = target._schema
    if schema.name in _HIDDEN_VIEWS:
        return ((0, schema.arguments[0].name),)
    if all(result.alias_info is None for result in schema.returns):
        return ()
    return tuple(
        (index, argument.name)
        for index, argument in enumerate(schema.arguments)
        if argument.alias_info is not None
    )
