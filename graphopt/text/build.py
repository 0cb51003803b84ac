"""`Program` to `Graph`: operators are looked up and run on fake tensors, and types are checked."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import (
    FakeTensor,
    FakeTensorMode,
    in_kernel_invocation_manager,
)
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils.checkpoint import CheckpointPolicy

from graphopt.analysis.fakes import symbolic_kernels
from graphopt.errors import TextError
from graphopt.graph import Graph, Level
from graphopt.ops.numbers import NUMBER_FUNCTIONS
from graphopt.plan import Phase, Role, Signature
from graphopt.text.elements import elements_of, restored
from graphopt.text.functions import Method, function_of, may_call
from graphopt.text.lift import type_of
from graphopt.text.made_sizes import Known, Made, nothing_known
from graphopt.text.names import GETITEM, operator_hint, operator_of
from graphopt.text.operators import is_allowed, misfit
from graphopt.text.sizes import Symbol
from graphopt.text.source import Source
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
from graphopt.text.writer import write_type


def build_graph(
    program: Program,
    source: Source,
    constants: Mapping[str, Tensor],
    *,
    typed: bool = False,
    known: Known = nothing_known,
) -> Graph:
    """The graph that a program means; errors point into `source`, the text it was read from.

    With `typed`, values are those of the types that are written, and no operator runs.
    """
    functions = program.level == Level.FORWARD
    try:
        builder = _Builder(
            source, constants, program.symbols, functions=functions, typed=typed, known=known
        )
    except Exception as error:  # a shape environment refuses some ranges by assertions
        raise TextError(f"torch has no such symbols: {_first_line(error)}") from error
    frame = _Frame("")
    with _quiet(), _as_it_is():
        for statement in program.statements:
            builder.add(statement, frame)
    frame.graph.output([frame.nodes[name] for _, name in program.outputs])
    inputs = [s.what.slot for s in program.statements if isinstance(s.what, Input)]
    signature = Signature(
        inputs=tuple(slot for slot in inputs if slot),
        outputs=tuple(slot for slot, _ in program.outputs),
    )
    return Graph(_module(frame), signature, Level(program.level), facts=program.facts)


def _module(frame: _Frame) -> fx.GraphModule:
    """Of a finished frame; its code is made here, which may find what no line has shown."""
    try:
        return frame.module()
    except Exception as error:
        raise TextError(f"these lines are no code together: {_first_line(error)}") from error


_DEVICES = ("cpu", "cuda")
_NUMBERS = frozenset({GETITEM, *NUMBER_FUNCTIONS})
_OPERATORS = (torch._ops.OpOverload, torch._ops.HigherOrderOperator)


class _Frame:
    """One graph under construction; `path` is the prefix of a sub-graph's constants."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.graph = fx.Graph()
        self.nodes: dict[str, fx.Node] = {}
        self.attributes: dict[str, Tensor | fx.GraphModule] = {}
        self.without: dict[fx.Node, Any] = {}  # results that are no values: contexts, nothing

    def module(self) -> fx.GraphModule:
        return fx.GraphModule(dict(self.attributes), self.graph)

    def argument(self, value: Literal) -> Any:
        """An argument of the text as an argument of a node."""
        match value:
            case Ref():
                return self.nodes[value.name]
            case OpName():
                return operator_of(value.name)
            case tuple():
                return tuple(self.argument(item) for item in value)
            case list():
                return [self.argument(item) for item in value]
            case dict():
                return {key: self.argument(item) for key, item in value.items()}
            case Slice():
                return slice(*map(self.argument, value.parts))
        return value

    def value(self, node: fx.Node) -> Any:
        """What a node stands for when an operator is run on fake tensors."""
        if "val" in node.meta:
            return node.meta["val"]
        return self.without[node] if node in self.without else self.attributes[str(node.target)]


class _Builder:
    def __init__(
        self,
        source: Source,
        constants: Mapping[str, Tensor],
        symbols: Sequence[Symbol],
        *,
        functions: bool,
        typed: bool,
        known: Known,
    ) -> None:
        self._source = source
        self._typed = typed and not functions
        self._functions = functions
        self._constants = constants
        # With a shape environment, as in capture; sub-graphs hold constants that are not fake.
        # What has no fake kernel is not run at all: a text is no program until it is compiled.
        self._fake = FakeTensorMode(
            shape_env=ShapeEnv(),
            static_shapes=not symbols,
            allow_non_fake_inputs=True,
            allow_fallback_kernels=False,
        )
        if symbols:  # with symbols, looking for a result takes longer than the operator
            self._fake.cache_enabled = False
        self._sizes = Made(self._fake.shape_env, symbols, known)
        self._symbolic = bool(symbols)
        self._kernels = symbolic_kernels if symbols else nullcontext

    def add(self, statement: Statement, frame: _Frame) -> None:
        """Append one line to a graph."""
        try:
            self._add(statement, frame)
        except TextError:
            raise
        except Exception as error:
            said = f"torch refuses this line: {_first_line(error)}"
            raise self._source.error(statement.place, said) from error

    def _add(self, statement: Statement, frame: _Frame) -> None:
        what = statement.what
        if isinstance(what, Input):
            node = frame.graph.create_node("placeholder", statement.name, name=statement.name)
            node.meta["val"] = self._input(statement)
        elif isinstance(what, Call):
            node = self._call(statement, what, frame)
        else:
            node = frame.graph.create_node("get_attr", what.target, name=statement.name)
            if isinstance(what, Constant):
                value = self._constant(statement, what, frame)
                frame.attributes[what.target] = value
                node.meta["val"] = self._fake.from_tensor(value, static_shapes=True)
            elif what.body:
                frame.attributes[what.target] = self._sub_graph(what, what.body, frame)
        if "val" in node.meta and (self._symbolic or not self._typed):
            self._check(statement, node.meta["val"])
        frame.nodes[statement.name] = node
        _annotate(node, statement)

    def _input(self, statement: Statement) -> Tensor | torch.SymInt | int:
        type_, what = statement.type, statement.what
        slot = what.slot if isinstance(what, Input) else None
        if isinstance(type_, SizeType) and (slot is None or slot.role is Role.SIZE):
            return self._sizes.number(type_.value)
        if slot is not None and slot.role is Role.SIZE:
            raise self._source.error(
                statement.type_place, "a size must be a number", "write its symbol, as : int s0"
            )
        if not isinstance(type_, TensorType):
            raise self._source.error(
                statement.type_place, "an input must be a tensor", "write its type, as : f32[2,3]"
            )
        shape, stride = self._sizes.numbers(type_.shape), self._sizes.numbers(type_.stride)
        try:
            with self._fake:
                return torch.empty_strided(shape, stride, dtype=type_.dtype, device=type_.device)
        except (RuntimeError, TypeError) as error:
            raise self._source.error(
                statement.type_place, f"torch cannot make such a tensor: {_first_line(error)}"
            ) from error

    def _constant(self, statement: Statement, what: Constant, frame: _Frame) -> Tensor:
        before = frame.attributes.get(what.target)
        if isinstance(before, Tensor) and what.values is None:
            return before
        if what.values is None:
            name = frame.path + what.target
            if name not in self._constants:
                raise self._source.error(
                    statement.place,
                    f'the constant "{name}" is not in the text and was not given',
                    f'parse_graph(text, {{"{name}": tensor}})',
                )
            return self._constants[name]
        if not isinstance(statement.type, TensorType):
            raise self._source.error(statement.type_place, "a constant must be a tensor")
        try:
            value = restored(statement.type, what.values)
        except ValueError as error:
            raise self._source.error(statement.type_place, str(error)) from error
        if isinstance(before, Tensor):
            if elements_of(before) != elements_of(value):
                raise self._source.error(statement.place, f'const "{what.target}" has two values')
            return before
        return value

    def _sub_graph(self, what: SubGraph, body: Body, parent: _Frame) -> fx.GraphModule:
        frame = _Frame(f"{parent.path}{what.target}.")
        for statement in body.statements:
            self.add(statement, frame)
        frame.graph.output(frame.argument(body.result))
        return _module(frame)

    def _call(self, statement: Statement, what: Call, frame: _Frame) -> fx.Node:
        target = operator_of(what.op)
        if target is None and self._functions:
            target = function_of(what.op)
        if target is None:
            raise self._source.error(
                statement.place, f"there is no operator {what.op}", operator_hint(what.op)
            )
        if not (
            is_allowed(target)
            if isinstance(target, _OPERATORS)
            else what.op in _NUMBERS or may_call(what.op, what.args)
        ):
            raise self._source.error(
                statement.place,
                f"a text may not call {what.op}",
                "texts hold operators that compute values from values, and have a fake kernel",
            )
        args = tuple(frame.argument(arg) for arg in what.args)
        kwargs = {key: frame.argument(arg) for key, arg in what.kwargs.items()}
        if isinstance(target, Method):
            node = frame.graph.call_method(target.name, args, kwargs)
            node._rename(statement.name)
        else:
            node = frame.graph.create_node("call_function", target, args, kwargs, statement.name)
        if self._typed and not _shares(target) and _of_tensors(statement.type):
            node.meta["val"] = self._written(statement.type, target)
            return node
        try:
            if self._typed and not self._symbolic and isinstance(target, torch._ops.OpOverload):
                node.meta["val"] = self._view(statement, target, node, frame)
                return node
            with self._fake, torch.no_grad(), self._kernels():
                value = _run(target, node, frame.value)
                if isinstance(target, torch._ops.OpOverload) or statement.type != NONE:
                    node.meta["val"] = _restride(value, statement.type, self._sizes)
                else:
                    frame.without[node] = value
        except Exception as error:
            # Whatever a fake kernel raises, it means: not with these arguments.
            raise self._source.error(
                statement.place, f"{what.op} refuses these arguments: {_first_line(error)}"
            ) from error
        return node

    def _written(self, type_: Type, target: object) -> Any:
        """A value of the type that is written."""
        if isinstance(type_, tuple):
            returns = getattr(getattr(target, "_schema", None), "returns", ())
            listed = len(returns) == 1 and len(type_) > 0
            return (list if listed else tuple)(self._written(part, None) for part in type_)
        if not isinstance(type_, TensorType):
            return None
        shape, stride = self._sizes.numbers(type_.shape), self._sizes.numbers(type_.stride)
        value = torch.empty_strided(shape, stride, dtype=type_.dtype, device="meta")
        return FakeTensor(self._fake, value, type_.device)

    def _view(
        self, statement: Statement, target: Callable[..., Any], node: fx.Node, frame: _Frame
    ) -> Any:
        """The result of an operator whose result may lie in the memory of an operand."""
        with in_kernel_invocation_manager(self._fake), torch.no_grad():
            made = _run(target, node, frame.value)

        def fake(value: Any, type_: Type) -> Any:
            if isinstance(value, tuple | list) and isinstance(type_, tuple):
                return type(value)(map(fake, value, type_))
            if not isinstance(value, Tensor) or not isinstance(type_, TensorType):
                return value
            if value.device.type == "meta":
                own = FakeTensor(self._fake, value, type_.device)
            else:  # of numbers alone
                own = self._fake.from_tensor(value, static_shapes=True)
            return _restride(own, type_, self._sizes)

        value = fake(made, statement.type)
        if type_of(value, statement.name, self._sizes.symbols) != statement.type:
            raise ValueError("its result has another type than the text says")
        return value

    def _check(self, statement: Statement, value: object) -> None:
        try:
            actual = type_of(value, statement.name, self._sizes.symbols)
        except TextError as error:
            raise self._source.error(statement.place, error.message) from error
        if isinstance(statement.type, SizeType) and type(value) is int:
            actual = SizeType(value)  # a symbol for which there is one number left
        if actual != statement.type:
            written = "nothing" if statement.type == NONE else write_type(statement.type)
            raise self._source.error(
                statement.type_place,
                f"%{statement.name} is {write_type(actual)}, but the text says {written}",
            )


def _shares(target: object) -> bool:
    """Whether a result may lie in the memory of an operand, which types do not say."""
    if not isinstance(target, torch._ops.OpOverload):
        return True
    return any(returned.alias_info is not None for returned in target._schema.returns)


def _of_tensors(type_: Type) -> bool:
    """Whether a type alone says all about a value."""
    if isinstance(type_, tuple):
        return all(map(_of_tensors, type_))
    return isinstance(type_, TensorType) or type_ == NONE


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's log of what a fake kernel raised; our error says it."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before = logger.disabled
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = before


@contextmanager
def _as_it_is() -> Iterator[None]:
    """Functions of a forward graph enter modes, and the last of them may not leave them."""
    before = {d: (torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in _DEVICES}
    grad = torch.is_grad_enabled()
    try:
        yield
    finally:
        torch.set_grad_enabled(grad)
        for device, (enabled, dtype) in before.items():
            torch.set_autocast_enabled(device, enabled)
            torch.set_autocast_dtype(device, dtype)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


def _run(target: Callable[..., Any], node: fx.Node, value: Callable[[fx.Node], Any]) -> Any:
    args, kwargs = fx.map_arg((node.args, node.kwargs), value)
    if isinstance(target, torch._ops.OpOverload) and (wrong := misfit(target, args, kwargs)):
        raise TypeError(wrong)
    return target(*args, **kwargs)


def _restride(value: Any, type_: Type, sizes: Made) -> Any:
    """The value with the strides that are written, where the two differ in nothing that matters.

    The stride of a dimension of size one is arbitrary, and fake kernels differ in it between torch
    releases, and even by what else the process has imported; others look at it to choose the memory
    format of their result. Symbolic sizes are written as the graph knows them, which may be simpler
    than what one operator makes of its arguments.
    """
    if isinstance(value, tuple | list) and isinstance(type_, tuple) and len(value) == len(type_):
        parts = zip(value, type_, strict=True)
        return type(value)(_restride(part, kind, sizes) for part, kind in parts)
    if isinstance(value, torch.SymInt) and isinstance(type_, SizeType):
        written = sizes.number(type_.value)
        return written if sizes.same(value, written) else value
    if not isinstance(value, Tensor) or not isinstance(type_, TensorType):
        return value
    if not all(type(size) is int for size in (*value.shape, *value.stride())):
        return sizes.reshaped(value, type_)
    pairs = zip(value.shape, value.stride(), type_.stride, strict=False)
    if tuple(value.shape) != type_.shape or any(n > 1 and old != new for n, old, new in pairs):
        return value
    if value.stride() == type_.stride:
        return value
    return value.as_strided(type_.shape, type_.stride, value.storage_offset())


def _annotate(node: fx.Node, statement: Statement) -> None:
    backward = statement.phase is Phase.BACKWARD
    node.meta["partitioner_tag"] = "is_backward" if backward else "is_forward"
    if statement.module:
        key = "fwd_nn_module_stack" if backward else "nn_module_stack"
        node.meta[key] = {statement.module: (statement.module, "")}
    if statement.recompute:
        node.meta["recompute"] = CheckpointPolicy[statement.recompute.upper()]
    if statement.region is not None:
        node.meta["ac_graph_id"] = statement.region
