"""Builds joint graphs by running ATen operators on fake tensors and writing down every call.

No model and no capture is involved: whoever generates a graph calls operators inside
`Recorder.recording`, then `differentiate`, then `finish`. The backward half is the true derivative,
because autograd itself produces it while the recorder listens below.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import reduce
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only
from torch.utils._sympy.functions import FloorDiv, Mod

from graphopt.analysis.fakes import symbolic_kernels
from graphopt.graph import Graph, Level, value_of
from graphopt.plan import Phase, Role, Signature, Slot
from graphopt.text.made_sizes import Made
from graphopt.text.sizes import Symbol

aten = torch.ops.aten

_INPUT_ORDER = (Role.PARAM, Role.BUFFER, Role.SIZE, Role.INPUT, Role.TANGENT)
# What expressions of sizes consist of.
_FUNCTIONS: Mapping[Any, Callable[[Any, Any], Any]] = {
    sympy.Add: operator.add,
    sympy.Mul: operator.mul,
    sympy.Pow: operator.pow,
    FloorDiv: operator.floordiv,
    Mod: operator.mod,
}
# The train-mode operator mutates its running statistics; a captured graph holds the functional
# twin, which returns them. The recorder makes the same exchange.
_MUTATING_BATCH_NORM = aten._native_batch_norm_legit.default
_FUNCTIONAL_BATCH_NORM = aten._native_batch_norm_legit_functional.default


class NotWritten(Exception):
    """A size is an expression for which there is no node."""


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes every ATen call that reaches it into an `fx.Graph`.

    Args:
        symbols: sizes of the recorded call that are symbols of the graph, by name.
    """

    def __init__(self, symbols: Mapping[str, int] | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._hints = dict(symbols or {})
        self.fake = FakeTensorMode(shape_env=ShapeEnv()) if symbols else FakeTensorMode()
        named = [Symbol(name, hint, 2) for name, hint in self._hints.items()]
        self._made = Made(self.fake.shape_env, named)
        self._symbols = {symbol.name: symbol.expression for symbol in named}
        self._numbers: dict[Any, fx.Node] = {}
        self.graph = fx.Graph()
        self.phase = Phase.FORWARD
        self.module = ""
        self.slots: dict[fx.Node, Slot] = {}
        self.mutations: dict[str, Tensor] = {}
        # What `duplicate` may repeat: the functional batch norm alone has no derivative.
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []
        self._constants = torch.nn.Module()
        self._nodes: dict[int, fx.Node] = {}
        self._alive: list[Tensor] = []
        self._paused = False

    @property
    def symbolic(self) -> bool:
        """Whether sizes are symbols."""
        return bool(self._hints)

    # -- what the graph reads --------------------------------------------------------------------

    def placeholder(
        self,
        role: Role,
        name: str,
        shape: Sequence[int],
        dtype: torch.dtype = torch.float32,
        *,
        requires_grad: bool = False,
    ) -> Tensor:
        """A new graph input, as a contiguous fake tensor."""
        with self._unrecorded():
            tensor = torch.empty(tuple(shape), dtype=dtype, requires_grad=requires_grad)
        prefix = {Role.PARAM: "p", Role.BUFFER: "b", Role.INPUT: "x", Role.TANGENT: "tangent"}[role]
        node = self.graph.placeholder(f"{prefix}_{name.replace('.', '_')}")
        phase = Phase.BACKWARD if role is Role.TANGENT else Phase.FORWARD
        self.slots[node] = Slot(role, name, phase)
        self._bind(tensor, node, phase)
        return tensor

    def size(self, symbol: str, name: str) -> Any:
        """A symbol as a size of a tensor; an input of this name, where it is used first."""
        expression = self._symbols[symbol]
        number = self._made.number(expression)
        if expression not in self._numbers:
            node = self.graph.placeholder(f"n_{name.replace('.', '_')}")
            self.slots[node] = Slot(Role.SIZE, name)
            node.meta.update(val=number, partitioner_tag="is_forward")
            self._numbers[expression] = node
        return number

    def constant(self, values: Sequence[float]) -> Tensor:
        """A vector stored on the module and read by ``get_attr``."""
        name = f"_tensor_constant{len(dict(self._constants.named_buffers()))}"
        with _disable_current_modes():
            value = torch.tensor(values)
            tensor = self.fake.from_tensor(value, static_shapes=True)
        self._constants.register_buffer(name, value)
        node = self.graph.create_node("get_attr", name)
        self._bind(tensor, node, self.phase)
        return tensor

    def node(self, tensor: Tensor) -> fx.Node:
        """The node that produced `tensor`; raises ``KeyError`` for a tensor not of this graph."""
        return self._nodes[id(tensor)]

    def read_memory(self) -> set[int]:
        """Identities of the storages behind inputs, constants and mutations."""
        read = (t for t in self._alive if self.node(t).op in ("placeholder", "get_attr"))
        return {t.untyped_storage()._cdata for t in (*read, *self.mutations.values())}

    # -- recording -------------------------------------------------------------------------------

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record every operator that runs inside."""
        with symbolic_kernels() if self._hints else nullcontext(), self.fake, self:
            yield

    def differentiate(self, outputs: Sequence[Tensor]) -> dict[str, Tensor]:
        """Record the backward half: gradients of all inputs that want one, by name.

        Each output that requires grad gets a tangent named after its position. Inputs that no
        output depends on have no entry.
        """
        self.phase = Phase.BACKWARD
        self.module = ""
        pairs = [
            (tensor, self.placeholder(Role.TANGENT, str(i), tensor.shape, tensor.dtype))
            for i, tensor in enumerate(outputs)
            if tensor.requires_grad
        ]
        wanted = [
            (self.slots[node].name, tensor)
            for tensor in self._alive
            if (node := self.node(tensor)) in self.slots and tensor.requires_grad
        ]
        grads = torch.autograd.grad(
            [tensor for tensor, _ in pairs],
            [tensor for _, tensor in wanted],
            [tangent for _, tangent in pairs],
            allow_unused=True,
        )
        return {name: g for (name, _), g in zip(wanted, grads, strict=True) if g is not None}

    def finish(
        self, outputs: Sequence[Tensor], gradients: dict[str, Tensor], level: Level
    ) -> Graph:
        """The recorded graph: mutations, then outputs, then gradients."""
        returned = {Slot(Role.MUTATION, name): tensor for name, tensor in self.mutations.items()}
        returned |= {Slot(Role.OUTPUT, str(i)): tensor for i, tensor in enumerate(outputs)}
        inputs = sorted(self.slots, key=lambda node: _INPUT_ORDER.index(self.slots[node].role))
        names = [self.slots[node].name for node in inputs]
        for name in sorted(gradients, key=names.index):
            returned[Slot(Role.GRAD, name, Phase.BACKWARD)] = gradients[name]
        for node in reversed(inputs):
            next(iter(self.graph.nodes)).prepend(node)
        self.graph.output([self.node(tensor) for tensor in returned.values()])
        signature = Signature(tuple(self.slots[node] for node in inputs), tuple(returned))
        return Graph(fx.GraphModule(self._constants, self.graph), signature, level)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._paused:
            return func(*args, **kwargs)
        if func is _MUTATING_BATCH_NORM:
            return self._batch_norm(args)
        if func._schema.is_mutable:
            raise AssertionError(f"{func} writes in place; generated graphs are functional")
        return self._record(func, args, kwargs)

    def _batch_norm(self, args: tuple[Any, ...]) -> Any:
        *result, mean, var = self._record(_FUNCTIONAL_BATCH_NORM, args, {})
        for buffer, new in zip(args[3:5], (mean, var), strict=True):
            self.mutations[self.slots[self.node(buffer)].name] = new
        return tuple(result)

    def _record(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = func(*args, **kwargs)
        if not any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):
            return result
        if self.phase is Phase.FORWARD and func is not _FUNCTIONAL_BATCH_NORM:
            self.calls.append((func, args, kwargs))
        node = self.graph.create_node(
            "call_function",
            func,
            tree_map(self._argument, args),
            tree_map(self._argument, kwargs),
            name=func.overloadpacket.__name__,
        )
        self._bind(result, node, self.phase)
        if isinstance(result, tuple | list):
            for index, item in enumerate(result):
                if isinstance(item, Tensor):
                    part = self.graph.call_function(operator.getitem, (node, index))
                    self._bind(item, part, self.phase)
        return result

    def _argument(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.node(value)
        if isinstance(value, torch.SymInt):
            return self._number(self._made.symbols.expression(value))
        if isinstance(value, torch.SymFloat | torch.SymBool):
            raise NotWritten(str(value))
        return value

    def _number(self, expression: Any) -> fx.Node | int:
        """A node for an expression of symbols, or a number.

        Raises:
            NotWritten: it is none of sums, products, powers and quotients.
        """
        if isinstance(expression, int) or getattr(expression, "is_Integer", False):
            return int(expression)
        if expression in self._numbers:
            return self._numbers[expression]
        if type(expression) not in _FUNCTIONS:
            raise NotWritten(str(expression))
        function = _FUNCTIONS[type(expression)]
        operands = [self._number(part) for part in expression.args]
        found = reduce(lambda a, b: self._combined(function, a, b), operands)
        assert isinstance(found, fx.Node)
        self._numbers[expression] = found
        return found

    def _combined(
        self, function: Callable[[Any, Any], Any], one: fx.Node | int, other: fx.Node | int
    ) -> fx.Node:
        node = self.graph.call_function(function, (one, other))
        values = fx.map_arg(node.args, value_of)
        node.meta.update(val=function(*values), partitioner_tag=f"is_{self.phase}")
        return node

    def _bind(self, value: Any, node: fx.Node, phase: Phase) -> None:
        if isinstance(value, Tensor):
            self._nodes[id(value)] = node
            self._alive.append(value)  # ids are only unique among living objects
        with self._unrecorded():
            node.meta["val"] = tree_map_only(Tensor, lambda t: t.detach(), value)
        node.meta["partitioner_tag"] = f"is_{phase}"
        if self.module and node.op == "call_function":
            stack = {self.module: (f"L['self'].{self.module}", "torch.nn.modules.module.Module")}
            node.meta["nn_module_stack"] = stack

    @contextmanager
    def _unrecorded(self) -> Iterator[None]:
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before
