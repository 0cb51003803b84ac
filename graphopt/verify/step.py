"""Invariants of meaning: what makes a well-formed graph a training step that can be split and run.

Phases, outputs that belong to inputs, frozen values and collectives.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator

import torch
from torch import fx
from torch._ops import OpOverload

from graphopt.graph import value_of
from graphopt.plan import Phase, Role, Slot
from graphopt.verify.form import Scan, Violation

_MUTABLE_ROLES = frozenset({Role.PARAM, Role.BUFFER, Role.INPUT, Role.STATE})
_DIFFERENTIABLE_ROLES = frozenset({Role.PARAM, Role.BUFFER, Role.INPUT})


def phases_ordered(scan: Scan) -> Iterator[Violation]:
    """Yield forward nodes that use a backward node or a tangent."""
    backward = scan.backward
    for node in scan.nodes:
        if node in backward or node.op == "output":
            continue
        for used in node.all_input_nodes:
            if used in backward:
                yield node, f"this forward node uses {used.name!r} of the backward half"


def forward_outputs(scan: Scan) -> Iterator[Violation]:
    """Yield forward outputs that only the backward half computes."""
    for slot, node in zip(scan.signature.outputs, scan.outputs, strict=True):
        if slot.phase is Phase.FORWARD and node in scan.backward:
            yield node, f"the forward output {slot} comes from the backward half"


def mutations_fit(scan: Scan) -> Iterator[Violation]:
    """Yield mutation outputs that do not fit an input."""
    yield from _belongs(scan, Role.MUTATION, _MUTABLE_ROLES)


def gradients_fit(scan: Scan) -> Iterator[Violation]:
    """Yield gradients that do not fit the input that they are of."""
    yield from _belongs(scan, Role.GRAD, _DIFFERENTIABLE_ROLES)
    yield from _belongs(scan, Role.LOCAL, _DIFFERENTIABLE_ROLES)


def _belongs(scan: Scan, role: Role, owners: frozenset[Role]) -> Iterator[Violation]:
    """Outputs of `role` have to name an input of one of `owners`, with equal shape and dtype."""
    inputs: dict[str, list[fx.Node]] = {}
    for slot, node in zip(scan.signature.inputs, scan.placeholders, strict=True):
        if slot.role in owners:
            inputs.setdefault(slot.name, []).append(node)
    for slot, node in zip(scan.signature.outputs, scan.outputs, strict=True):
        if slot.role is not role:
            continue
        owned = inputs.get(slot.name, [])
        if not owned:
            yield node, f"{slot} names no input"
        elif not any(_same_form(value_of(node), value_of(owner)) for owner in owned):
            have, want = _form(value_of(node)), _form(value_of(owned[0]))
            yield node, f"{slot} is {have}, but the input is {want}"


def _same_form(left: object, right: object) -> bool:
    if not (isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor)):
        return False
    return left.dtype == right.dtype and left.shape == right.shape


def _form(value: object) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return repr(value)


# -- frozen values ---------------------------------------------------------------------------------


def frozen_constant(scan: Scan) -> Iterator[Violation]:
    """Yield ``graphopt.frozen`` nodes above which something may change from step to step."""
    frozen = [node for node in scan.calls if _operator(node) == "graphopt::frozen"]
    if not frozen:
        return
    slots = dict(zip(scan.placeholders, scan.signature.inputs, strict=True))
    mutated = {slot.name for slot in scan.signature.outputs if slot.role is Role.MUTATION}
    for node in frozen:
        for source in _ancestors(node):
            if reason := _changes(scan, source, slots, mutated):
                yield node, f"it depends on {source.name!r}, {reason}"


def _ancestors(node: fx.Node) -> Iterator[fx.Node]:
    seen, stack = {node}, [node]
    while stack:
        for used in stack.pop().all_input_nodes:
            if used not in seen:
                seen.add(used)
                stack.append(used)
                yield used


def _changes(scan: Scan, node: fx.Node, slots: dict[fx.Node, Slot], mutated: set[str]) -> str:
    """Why the value of a node may differ between two steps with the same parameters, or ``""``."""
    if node.op == "placeholder":
        slot = slots[node]
        if slot.role not in (Role.PARAM, Role.BUFFER):
            return f"which is {slot} and no parameter or buffer"
        return f"and the graph mutates {slot}" if slot.name in mutated else ""
    if node.op == "get_attr":
        random = any(_is_random(inner) for inner in _nodes_inside(scan, node))
        return "which is random" if random else ""
    return "which is random" if _is_random(node) else ""


def _is_random(node: fx.Node) -> bool:
    target = node.target
    return isinstance(target, OpOverload) and torch.Tag.nondeterministic_seeded in target.tags


def _operator(node: fx.Node) -> str:
    return node.target._schema.name if isinstance(node.target, OpOverload) else ""


def _nodes_inside(scan: Scan, attribute: fx.Node) -> Iterator[fx.Node]:
    """All nodes of a subgraph that a ``get_attr`` node gives to a higher-order operator."""
    value = scan.attribute(attribute)
    if isinstance(value, fx.GraphModule):
        for module in value.modules():
            if isinstance(module, fx.GraphModule):
                yield from module.graph.nodes


# -- collectives -----------------------------------------------------------------------------------


def collectives_waited(scan: Scan) -> Iterator[Violation]:
    """Yield results of collectives that are not waited on exactly once, or read before it."""
    for node in scan.calls:
        if not _is_collective(node):
            continue
        if isinstance(value_of(node), torch.Tensor):
            yield from _waited_once(node)
            continue
        elements = [user for user in node.users if user.target is operator.getitem]
        taken = [user.args[1] for user in elements]
        for index in range(len(value_of(node))):
            if (times := taken.count(index)) != 1:
                yield node, f"its result {index} is taken {times} times, not once"
        for element in elements:
            yield from _waited_once(element)
        if len(elements) < len(node.users):
            yield node, "its results are read without waiting"


def _waited_once(node: fx.Node) -> Iterator[Violation]:
    waits = sum(_operator(user) == "_c10d_functional::wait_tensor" for user in node.users)
    if waits == 0:
        yield node, "it is never waited on"
    elif waits > 1:
        yield node, f"it is waited on {waits} times"
    elif len(node.users) > 1:
        yield node, "it is read without waiting"


def no_collective_inside(scan: Scan) -> Iterator[Violation]:
    """Yield subgraphs of higher-order operators that contain a collective."""
    for node in scan.attributes:
        for inner in _nodes_inside(scan, node):
            if _is_collective(inner):
                yield node, f"this subgraph contains the collective {inner.name!r}"


def _is_collective(node: fx.Node) -> bool:
    name = _operator(node)
    return name.startswith("_c10d_functional::") and name != "_c10d_functional::wait_tensor"
