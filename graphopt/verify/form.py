"""Invariants of form: what makes an fx graph a well-formed list of operator calls.

The checks run in the order of the table in `graphopt.verify`; each may rely on those before it.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterator
from functools import cache, cached_property

import torch
from torch import fx
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses.fake_tensor import FakeTensor

from graphopt.graph import Graph, Level, operator_name, phase_of
from graphopt.ops.numbers import is_number, number_function
from graphopt.plan import Phase, Role

Violation = tuple[fx.Node | None, str]


class Scan:
    """A graph with what several checks read, gathered once."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.signature = graph.signature
        self.nodes = graph.nodes
        self.position = {node: index for index, node in enumerate(self.nodes)}
        self.placeholders = tuple(n for n in self.nodes if n.op == "placeholder")
        self.calls = tuple(graph.operators)
        self.functions = graph.level is Level.FORWARD
        self.attributes = tuple(n for n in self.nodes if n.op == "get_attr")

    @cached_property
    def outputs(self) -> tuple[fx.Node, ...]:
        """The returned nodes, one per output slot."""
        return self.graph.outputs

    @cached_property
    def backward(self) -> frozenset[fx.Node]:
        """Nodes that exist only when the backward half runs, tangents included."""
        tangents = (
            node
            for node, slot in zip(self.placeholders, self.signature.inputs, strict=True)
            if slot.role is Role.TANGENT
        )
        tagged = (n for n in self.nodes if phase_of(n) is Phase.BACKWARD and n.op != "output")
        return frozenset((*tangents, *tagged))

    def attribute(self, node: fx.Node) -> object:
        """What a ``get_attr`` node reads; raises ``AttributeError``."""
        return operator.attrgetter(str(node.target))(self.graph.module)


def one_output_last(scan: Scan) -> Iterator[Violation]:
    """Yield output nodes that are too many or not last."""
    outputs = [node for node in scan.nodes if node.op == "output"]
    if not outputs:
        yield None, "there is no output node"
    for node in outputs[1:]:
        yield node, f"there are {len(outputs)} output nodes"
    if len(outputs) == 1 and outputs[0] is not scan.nodes[-1]:
        yield outputs[0], "nodes follow the output"


def placeholders_match(scan: Scan) -> Iterator[Violation]:
    """Yield placeholders after other nodes, or a number of them that the signature denies."""
    inputs = len(scan.signature.inputs)
    for index, node in enumerate(scan.placeholders):
        if scan.nodes[index] is not node:
            yield node, "another node comes before this placeholder"
            return
    if len(scan.placeholders) != inputs:
        last = scan.placeholders[-1] if scan.placeholders else None
        yield last, f"{len(scan.placeholders)} placeholders, but {inputs} inputs in the signature"


def outputs_match(scan: Scan) -> Iterator[Violation]:
    """Yield an output node whose argument is not one node per output slot."""
    output = scan.graph.output
    values = output.args[0] if len(output.args) == 1 and not output.kwargs else None
    if not isinstance(values, (list, tuple)):
        yield output, "the output has to have one argument, a flat list"
        return
    slots = scan.signature.outputs
    for index, value in enumerate(values):
        if not isinstance(value, fx.Node):
            name = str(slots[index]) if index < len(slots) else f"number {index}"
            yield output, f"output {name} is {value!r}, not a node"
    if len(values) != len(slots):
        yield output, f"{len(values)} values are returned, but the signature has {len(slots)}"


def names_unique(scan: Scan) -> Iterator[Violation]:
    """Yield nodes that share a name and slots that share role and name."""
    seen: set[str] = set()
    for node in scan.nodes:
        if node.name in seen:
            yield node, f"another node is called {node.name!r} too"
        seen.add(node.name)
    for slots, of_slots in (
        (scan.signature.inputs, scan.placeholders),
        (scan.signature.outputs, scan.outputs),
    ):
        count = Counter((slot.role, slot.name) for slot in slots)
        for slot, node in zip(slots, of_slots, strict=True):
            if count[slot.role, slot.name] > 1:
                yield node, f"the signature has {slot} more than once"


def defined_before_use(scan: Scan) -> Iterator[Violation]:
    """Yield nodes that use a later node, or a node of another graph."""
    position = scan.position
    for index, node in enumerate(scan.nodes):
        for used in node.all_input_nodes:
            where = position.get(used)
            if where is None:
                yield node, f"it uses {used.name!r}, which is not in this graph"
            elif where >= index:
                yield node, f"it uses {used.name!r}, which comes later"


def targets_allowed(scan: Scan) -> Iterator[Violation]:
    """Yield nodes that are no operator call, or call something that is no operator."""
    methods = ("call_method",) if scan.functions else ()
    for node in scan.nodes:
        if node.op not in ("placeholder", "get_attr", "call_function", "output", *methods):
            yield node, f"nodes of kind {node.op!r} are not allowed"
    if scan.functions:
        return
    for node in scan.calls:
        target = node.target
        if isinstance(target, OpOverload | HigherOrderOperator) or target is operator.getitem:
            continue
        if not number_function(target):
            yield node, f"it calls {operator_name(node)!r}, which is not an operator"
        elif not is_number(node.meta.get("val")):
            yield node, f"it calls {operator_name(node)!r}, which is for numbers only"


def attributes_exist(scan: Scan) -> Iterator[Violation]:
    """Yield ``get_attr`` nodes that name nothing."""
    for node in scan.attributes:
        try:
            scan.attribute(node)
        except AttributeError:
            yield node, f"the module has no attribute {node.target!r}"


@cache
def _parameters(target: OpOverload) -> tuple[tuple[str, ...], frozenset[str], frozenset[str]]:
    """Positional parameters of an operator, all of them, and the required ones."""
    arguments = target._schema.arguments
    return (
        tuple(a.name for a in arguments if not a.kwarg_only),
        frozenset(a.name for a in arguments),
        frozenset(a.name for a in arguments if not a.has_default_value()),
    )


def arguments_bind(scan: Scan) -> Iterator[Violation]:
    """Yield calls whose arguments do not fit the operator's schema in number and name."""
    for node in scan.calls:
        if not isinstance(node.target, OpOverload):
            continue
        positional, known, required = _parameters(node.target)
        given, by_name = len(node.args), node.kwargs
        if given > len(positional):
            limit = f"takes at most {len(positional)}"
            yield node, f"{given} positional arguments for {node.target}, which {limit}"
            continue
        if unknown := [name for name in by_name if name not in known]:
            yield node, f"{node.target} has no argument {unknown[0]!r}"
        elif twice := [name for name in positional[:given] if name in by_name]:
            yield node, f"{node.target} gets its argument {twice[0]!r} twice"
        elif missing := required.difference(positional[:given], by_name):
            yield node, f"{node.target} needs the argument {min(missing)!r}"


def values_present(scan: Scan) -> Iterator[Violation]:
    """Yield nodes without fake value, or with a real tensor as value."""
    for node in (*scan.placeholders, *scan.calls):
        value = node.meta.get("val")
        if value is None:
            if not _may_be_none(node, scan.functions):
                yield node, "it has no `val` in its meta"
        elif not isinstance(value, FakeTensor) and _has_real_tensor(value):
            yield node, "the `val` in its meta is a real tensor, not a fake one"
    for node in scan.attributes:
        if isinstance(scan.attribute(node), torch.Tensor) and node.meta.get("val") is None:
            yield node, "it has no `val` in its meta"


def _may_be_none(node: fx.Node, functions: bool) -> bool:
    """Some operators return nothing, and some leave elements of their result out."""
    if node.target is operator.getitem:
        return "val" in node.meta
    if functions and not isinstance(node.target, OpOverload):
        return True  # it changes a mode, or an element
    return isinstance(node.target, OpOverload) and not node.target._schema.returns


def _has_real_tensor(value: object) -> bool:
    if isinstance(value, (list, tuple)):
        return any(_has_real_tensor(part) for part in value)
    return isinstance(value, torch.Tensor) and not isinstance(value, FakeTensor)


def elements_exist(scan: Scan) -> Iterator[Violation]:
    """Yield ``getitem`` calls of something that is no tuple, or beyond its end."""
    for node in scan.calls:
        if node.target is not operator.getitem:
            continue
        if len(node.args) != 2 or node.kwargs:
            yield node, "getitem takes a node and an index"
            continue
        source, index = node.args
        values = source.meta.get("val") if isinstance(source, fx.Node) else None
        if scan.functions and not isinstance(values, (list, tuple)):
            continue  # indexing of a tensor
        if not isinstance(values, (list, tuple)):
            yield node, f"{source} has no elements"
        elif type(index) is not int or not 0 <= index < len(values):
            yield node, f"{source} has {len(values)} elements and no element {index}"
