"""The graph of one step, forward and backward together, with names for everything.

`Graph` wraps one `torch.fx.GraphModule` of ATen operators, or of torch functions in front of
autograd. Its `Signature` gives every input and output a role and a qualified name. A version
counter invalidates analyses.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator, Mapping
from enum import StrEnum
from typing import Any, NoReturn, TypeVar, cast

import torch
from torch.fx import GraphModule, Node
from torch.fx._lazy_graph_module import _LazyGraphModule

from graphopt.errors import TextError
from graphopt.ops.numbers import number_function
from graphopt.plan import Phase, Role, Signature, Slot

T = TypeVar("T")

# The only entries of `node.meta` that graphopt reads; everything else is disposable.
KEPT_META = (
    "val",
    "partitioner_tag",
    "recompute",
    "ac_graph_id",
    "nn_module_stack",
    "fwd_nn_module_stack",
    "stack_trace",
    "seq_nr",
)


class Level(StrEnum):
    """What kind of graph this is.

    ``FORWARD``: torch-level operators, differentiable, for rewrites whose backward autograd
    derives. ``JOINT``: ATen operators, forward and backward. ``INFERENCE``: ATen operators, no
    backward.
    """

    FORWARD = "forward"
    JOINT = "joint"
    INFERENCE = "inference"


class Graph:
    """One `GraphModule` with a signature and cached analyses.

    Args:
        module: ATen-level (or torch-level) module; its graph has one placeholder per input slot and
            one output node whose argument is a flat list with one entry per output slot.
        signature: roles and names of inputs and outputs.
        level: what kind of graph it is.
        facts: what is known about it (``"captured"``, later what passes provided).
    """

    def __init__(
        self,
        module: GraphModule,
        signature: Signature,
        level: Level,
        *,
        facts: frozenset[str] = frozenset({"captured"}),
    ) -> None:
        self._module = module
        self._stale = False
        self.signature = signature
        self.level = level
        self.facts = facts
        self._version = 0
        self._analyses: dict[Callable[[Graph], Any], tuple[int, Any]] = {}

    # -- reading ---------------------------------------------------------------------------------

    @property
    def module(self) -> GraphModule:
        """The wrapped module, with its code up to date."""
        if self._stale:
            self._module.recompile()
            self._stale = False
        return self._module

    @property
    def fx(self) -> torch.fx.Graph:
        """The wrapped `torch.fx.Graph`."""
        return self._module.graph

    @property
    def nodes(self) -> tuple[Node, ...]:
        """All nodes, in order."""
        return tuple(self.fx.nodes)

    @property
    def operators(self) -> Iterator[Node]:
        """The nodes that compute something."""
        return (n for n in self.nodes if n.op in ("call_function", "call_method"))

    @property
    def inputs(self) -> tuple[Node, ...]:
        """Placeholders, one per input slot."""
        return tuple(n for n in self.fx.nodes if n.op == "placeholder")

    @property
    def output(self) -> Node:
        """The output node."""
        return self.fx.output_node()

    @property
    def outputs(self) -> tuple[Node, ...]:
        """The nodes that are returned, one per output slot."""
        return tuple(cast("list[Node]", self.output.args[0]))

    def input(self, role: Role, name: str) -> Node:
        """The placeholder with this role and name; raises ``KeyError``."""
        return self.inputs[self.signature.input_index(role, name)]

    def gradient(self, name: str) -> Node:
        """The node that produces the gradient of parameter (or input) `name`."""
        return self.outputs[self.signature.output_index(Role.GRAD, name)]

    def slot(self, placeholder: Node) -> Slot:
        """The input slot of a placeholder."""
        return self.signature.inputs[self.inputs.index(placeholder)]

    # -- writing ---------------------------------------------------------------------------------

    @property
    def version(self) -> int:
        """Grows with every change that was announced by `changed`."""
        return self._version

    def changed(self) -> None:
        """Announce that the fx graph was edited: its code and cached analyses are stale."""
        self._version += 1
        self._stale = True

    def set_outputs(self, outputs: Mapping[Slot, Node]) -> None:
        """Replace all outputs; forward slots must come before backward slots."""
        self.signature = Signature(self.signature.inputs, tuple(outputs))
        self.output.args = (list(outputs.values()),)

    def add_input(self, slot: Slot, value: Any) -> Node:
        """Append an input; `value` is its fake value. Used by passes that own state."""
        with self.fx.inserting_after(self.inputs[-1]):
            node = self.fx.placeholder(re.sub(r"\W", "_", slot.name))
        node.meta["val"] = value
        self.signature = Signature((*self.signature.inputs, slot), self.signature.outputs)
        return node

    def get(self, analysis: Callable[[Graph], T]) -> T:
        """The result of an analysis, cached until the graph changes."""
        cached = self._analyses.get(analysis)
        if cached is None or cached[0] != self._version:
            cached = (self._version, analysis(self))
            self._analyses[analysis] = cached
        return cast("T", cached[1])

    def copy(self) -> Graph:
        """An independent copy with the same parameters and constants by reference."""
        graph = torch.fx.Graph()
        result = graph.graph_copy(self.fx, {})
        output = graph.output(result)
        output.meta.update(self.output.meta)
        # Most copies are only compared, so their code is written when it is asked for.
        module = _LazyGraphModule(self._module, graph)
        return Graph(module, self.signature, self.level, facts=self.facts)

    def __reduce__(self) -> NoReturn:
        # Pickling a GraphModule turns in-place operators into out-of-place ones (pytorch#198077).
        raise TextError(
            "a graph is not pickled", hint="graphopt.print_graph(graph) and graphopt.parse_graph"
        )

    def __len__(self) -> int:
        return len(self.fx.nodes)


# -- what is written on a node ---------------------------------------------------------------------


def phase_of(node: Node) -> Phase:
    """The half of the step that a node belongs to."""
    in_backward = node.meta.get("partitioner_tag") in ("is_backward", "must_be_in_backward")
    return Phase.BACKWARD if in_backward else Phase.FORWARD


def value_of(node: Node) -> Any:
    """The fake value of a node: a `FakeTensor`, a tuple of them, or a number."""
    return node.meta.get("val")


_ROOT = re.compile(r"^L\['\w+'\]\.?")
_CONTAINER = re.compile(r"\._modules\['([^']+)'\]|\['([^']+)'\]|\[(\d+)\]")


def module_of(node: Node) -> str:
    """Qualified name of the innermost module that a node comes from; ``""`` for the root.

    Backward nodes belong to the module whose forward they differentiate.
    """
    stack = module_stack(node)
    return stack[-1][0] if stack else ""


def module_stack(node: Node) -> tuple[tuple[str, str], ...]:
    """Qualified name and class name of all modules around a node, outermost first."""
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack") or {}
    return tuple((_module_path(path), _class_name(kind)) for path, kind in stack.values())


def _module_path(raw: str) -> str:
    path = _CONTAINER.sub(lambda m: "." + next(g for g in m.groups() if g), _ROOT.sub("", raw))
    return path.lstrip(".")


def _class_name(kind: object) -> str:
    return kind.__name__ if isinstance(kind, type) else str(kind).rsplit(".", 1)[-1]


def source_of(node: Node) -> str:
    """The user's source line of a node as ``file:line: code``; ``""`` when it is not known."""
    trace = node.meta.get("stack_trace") or ""
    frames = re.findall(r'File "([^"]+)", line (\d+), in [^\n]*\n\s*([^\n]+)', trace)
    own = [f for f in frames if "/torch/" not in f[0]] or frames
    return "{}:{}: {}".format(*own[-1]) if own else ""


def operator_name(node: Node) -> str:
    """Qualified name of what a node calls (``"aten.mm.default"``, ``"getitem"``)."""
    target = node.target
    if isinstance(target, str):
        return f"Tensor.{target}"
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    if target is operator.getitem:
        return "getitem"
    return number_function(target) or getattr(target, "__name__", str(target))
