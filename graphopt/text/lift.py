"""`Graph` to `Program`: every node as data, or an error that names the node that cannot be text."""

from __future__ import annotations

from types import EllipsisType
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.errors import TextError
from graphopt.graph import Graph, Level, module_of, phase_of, source_of
from graphopt.plan import Phase
from graphopt.text.elements import inlined
from graphopt.text.functions import function_name
from graphopt.text.header import running_torch
from graphopt.text.names import name_of
from graphopt.text.sizes import Symbols
from graphopt.text.syntax import (
    NONE,
    Body,
    Call,
    Constant,
    Input,
    Literal,
    OpName,
    Program,
    Ref,
    SizeType,
    Slice,
    Statement,
    SubGraph,
    TensorType,
    Type,
)

_PHASES = {None: Phase.FORWARD, "is_forward": Phase.FORWARD, "is_backward": Phase.BACKWARD}


def lift_graph(graph: Graph, *, sources: bool = False) -> Program:
    """The program that a graph is; with `sources`, the user's source lines too."""
    lifter = _Lifter(graph, sources)
    statements = lifter.statements(graph.module)
    if len(graph.inputs) != len(graph.signature.inputs):
        raise TextError(
            f"the graph has {len(graph.inputs)} inputs, its signature {len(graph.signature.inputs)}"
        )
    if len(graph.outputs) != len(graph.signature.outputs):
        raise TextError(
            f"the graph returns {len(graph.outputs)} values, its signature names "
            f"{len(graph.signature.outputs)}"
        )
    outputs = []
    for slot, node in zip(graph.signature.outputs, graph.outputs, strict=True):
        if not isinstance(node, fx.Node):
            raise TextError("an output is not a node of the graph", where=f"{slot}: {node!r}")
        outputs.append((slot, node.name))
    return Program(
        graph.level.value,
        running_torch(),
        graph.facts,
        statements,
        tuple(outputs),
        tuple(lifter.symbols.found),
    )


class _Lifter:
    def __init__(self, graph: Graph, sources: bool) -> None:
        self._slots = iter(graph.signature.inputs)
        self._sources = sources
        self.symbols = Symbols()
        for node in graph.inputs:
            self.symbols.note(node.meta.get("val"))
        self._functions = graph.level is Level.FORWARD
        # Region numbers count up within a process; their order is all that means something.
        regions = {n.meta["ac_graph_id"] for n in graph.nodes if "ac_graph_id" in n.meta}
        self._regions = {region: rank for rank, region in enumerate(sorted(regions))}

    def statements(
        self, module: fx.GraphModule, phase: Phase | None = None
    ) -> tuple[Statement, ...]:
        """The lines of a graph, or of a sub-graph that runs in `phase`."""
        shown: set[str] = set()
        return tuple(
            self._statement(node, module, phase, shown)
            for node in module.graph.nodes
            if node.op != "output"
        )

    def _statement(
        self, node: fx.Node, module: fx.GraphModule, phase: Phase | None, shown: set[str]
    ) -> Statement:
        tag = node.meta.get("partitioner_tag")
        if tag not in _PHASES:
            raise TextError(f"partitioner tag {tag!r} has no text form", where=node.name)
        own = phase or phase_of(node)
        value = node.meta.get("val")
        what: Input | Constant | SubGraph | Call
        if node.op == "placeholder":
            what = Input(None)
            if phase is None:
                what = Input(next(self._slots, None))
                own = what.slot.phase if what.slot else own
        elif node.op == "get_attr":
            attribute = _attribute(module, node)
            if isinstance(attribute, Tensor):
                what, value = Constant(str(node.target), inlined(attribute)), attribute
            else:
                what = self._sub_graph(node, attribute, own, shown)
        else:
            what = _call(node, self._functions)
        policy, region = node.meta.get("recompute"), node.meta.get("ac_graph_id")
        if region is not None and policy is None:
            raise TextError("a checkpointed region without a policy", where=node.name)
        return Statement(
            name=node.name,
            what=what,
            type=self._type(node, what, value),
            phase=own,
            module=module_of(node),
            recompute=policy.name.lower() if policy is not None else "",
            region=self._regions.get(region),
            source=source_of(node).rsplit(": ", 1)[0] if self._sources else "",
        )

    def _type(self, node: fx.Node, what: object, value: object) -> Type:
        if isinstance(what, SubGraph):
            return NONE
        return _type_of_node(node, value, self._functions, self.symbols)

    def _sub_graph(
        self, node: fx.Node, attribute: object, phase: Phase, shown: set[str]
    ) -> SubGraph:
        if not isinstance(attribute, fx.GraphModule):
            raise TextError(
                f"an attribute that is a {type(attribute).__name__} has no text form",
                where=f"{node.name} = {node.target}",
            )
        target = str(node.target)
        if target in shown:
            return SubGraph(target, None)
        shown.add(target)
        (result,) = attribute.graph.output_node().args
        body = Body(self.statements(attribute, phase), _literal(result, node))
        return SubGraph(target, body)


def _attribute(module: fx.GraphModule, node: fx.Node) -> object:
    value: object = module
    for part in str(node.target).split("."):
        value = getattr(value, part, None)
    return value


def _call(node: fx.Node, functions: bool) -> Call:
    name = name_of(node.target) if node.op == "call_function" else None
    if name is None and functions and node.op in ("call_function", "call_method"):
        name = function_name(node)
    if name is None:
        raise TextError(
            "only ATen and other registered operators have a text form",
            where=f"{node.name} calls {node.target!r}",
        )
    args = tuple(_literal(arg, node) for arg in node.args)
    return Call(name, args, {key: _literal(arg, node) for key, arg in node.kwargs.items()})


def _literal(value: Any, node: fx.Node) -> Literal:
    match value:
        case fx.Node():
            return Ref(value.name)
        case None | bool() | str():
            return value
        case int():
            return int(value)
        case float():
            return float(value)
        case complex():
            return complex(value)
        case tuple():
            return tuple(_literal(item, node) for item in value)
        case list():
            return [_literal(item, node) for item in value]
        case slice():
            parts = (value.start, value.stop, value.step)
            return Slice(tuple(_literal(part, node) for part in parts))
        case EllipsisType():
            return value
        case dict() if all(isinstance(key, str) for key in value):
            return {key: _literal(item, node) for key, item in value.items()}
        case torch.dtype() | torch.device() | torch.layout() | torch.memory_format():
            return value
        case torch._ops.OpOverload():
            return OpName(str(value))
    raise TextError(
        f"an argument of type {type(value).__name__} has no text form",
        where=f"{node.name}: {value!r}",
    )


def _type_of_node(node: fx.Node, value: object, functions: bool, symbols: Symbols) -> Type:
    if functions and not isinstance(node.target, torch._ops.OpOverload) and "val" not in node.meta:
        return NONE  # a function that changes a mode or an item returns nothing
    if value is None and "val" not in node.meta and not _returns_nothing(node):
        raise TextError(
            "a node without meta['val'] has no text form",
            where=node.name,
            hint="give every node that a pass makes its fake value",
        )
    return type_of(value, node.name, symbols)


def _returns_nothing(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and not node.target._schema.returns


def type_of(value: object, where: str, symbols: Symbols | None = None) -> Type:
    """The type of a value, in terms of symbols; raises `TextError` for one that depends on data."""
    symbols = symbols or Symbols()
    match value:
        case Tensor():
            return _tensor_type(value, where, symbols)
        case tuple() | list():
            return tuple(type_of(item, where, symbols) for item in value)
        case None:
            return NONE
        case bool() | int() | float():
            return type(value).__name__
        case torch.SymInt() if (size := symbols.expression(value)) is not None:
            return SizeType(size)
        case torch.SymBool() | torch.SymInt() | torch.SymFloat():
            return type(value).__name__.removeprefix("Sym").lower()
    raise TextError(f"a value of type {type(value).__name__} has no text form", where=where)


def _tensor_type(value: Tensor, where: str, symbols: Symbols) -> TensorType:
    if value.layout is not torch.strided:
        raise TextError(f"a tensor with layout {value.layout} has no text form", where=where)
    sizes = [symbols.expression(size) for size in (*value.shape, *value.stride())]
    known = tuple(size for size in sizes if size is not None)
    if len(known) < len(sizes):
        raise TextError(
            "a tensor with symbolic sizes that no input tells has no text form", where=where
        )
    return TensorType(value.dtype, known[: value.dim()], known[value.dim() :], value.device)
