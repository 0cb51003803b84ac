"""Rewrite a forward graph so that each stage only reads what the stage before it returns.

A value that a later stage reads is cloned in every stage between, and an output of the model in
every stage up to the last one. Autograd then derives the way back: each clone hands its gradient to
the stage before, and a stage that both reads a value and passes it on adds the two up.

Not every backend of `torch.distributed` sends tensors that are not contiguous. What a stage returns
therefore is, and `received` makes the gradients that go back so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, fx

from graphopt.analysis.aliasing import storage_of
from graphopt.graph import value_of

aten = torch.ops.aten

STAGE = "stage"  # in the meta of a node: the stage that it is in
_ROOT = {"L__self__": ("", "")}  # nn_module_stack of what belongs to no module


def received(value: Tensor) -> Tensor:
    """The value itself; its gradient is contiguous."""
    return cast("Tensor", _ContiguousGradient.apply(value))  # type: ignore[no-untyped-call]


class _ContiguousGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.contiguous()


def relayed(graph: fx.Graph, stage: Mapping[fx.Node, int]) -> fx.Graph:
    """The same computation in the order of the stages, with relays.

    Within a stage, operators keep their order. The first stage reads the inputs of the model in
    their order, those that nobody reads included.

    Args:
        graph: placeholders, attributes and functions, with fake values.
        stage: of every function, from 0, none empty; those of its operands are not later ones, and
            what crosses is a tensor. A view of an input or of an attribute may be missing: each
            stage that reads it makes it.

    Returns:
        A graph for the same module; ``meta[STAGE]`` of each function says where it is.
    """
    return _Relaying(graph, stage).rewritten()


class _Relaying:
    def __init__(self, graph: fx.Graph, stage: Mapping[fx.Node, int]) -> None:
        self.old, self.stage = graph, stage
        self.nodes = list(graph.nodes)
        self.memory = storage_of(self.nodes)
        self.last = max(stage.values())
        self.final = [n for n in self.nodes if n in graph.output_node().all_input_nodes]
        self.until: dict[fx.Node, int] = {}  # the last stage that needs a value
        self.reads: set[tuple[fx.Node, int]] = set()  # memory, and a stage with an operator on it
        for node in stage:
            for operand in node.all_input_nodes:
                self._need(operand, stage[node])
                if self.memory.owner[node] is not self.memory.owner[operand]:
                    self.reads.add((self.memory.owner[operand], stage[node]))
        for node in self.final:
            self._need(node, self.last)
        self.new = fx.Graph()
        self.here: dict[fx.Node, fx.Node] = {}  # what the current stage reads for each value
        self.again: dict[fx.Node, fx.Node] = {}  # views that it makes for itself

    def rewritten(self) -> fx.Graph:
        """Write the stages one after another."""
        for node in self.nodes:
            if node.op in ("placeholder", "get_attr"):
                self.here[node] = self.new.node_copy(node)
        for number in range(self.last + 1):
            self._write(number)
        output = self.old.output_node()
        self.new.node_copy(output, lambda n: self._read(n, self.last, {}))
        self._read_inputs_in_order()
        self.new.set_codegen(self.old._codegen)
        return self.new

    def _write(self, number: int) -> None:
        self.again = {}
        for node in self._arriving(number):
            self.here[node] = self._called(received, self.here[node], f"{node.name}_received")
            self._mark(self.here[node], number, value_of(node))
        passed = {n: self._cloned(n, number) for n in self._passing(number)}
        own = [n for n in self.nodes if self.stage.get(n) == number]
        for node in own:
            self.here[node] = self._copied(node, number, node.meta)
        for node in own:
            sent = self.until.get(node, 0) > number
            returned = sent or (number == self.last and node in self.final)
            if (sent and not self._can_be_sent(node)) or (returned and self._is_read(node)):
                self.here[node] = self._cloned(node, number)
        self.here |= passed

    def _arriving(self, number: int) -> list[fx.Node]:
        """What a stage gets from the one before that may have a gradient, in order."""
        if number == 0:
            return []
        needed = [n for n in self.nodes if n in self.here and self.until.get(n, -1) >= number]
        return [n for n in needed if value_of(n).is_floating_point()]

    def _passing(self, number: int) -> list[fx.Node]:
        """What a stage gets and passes on, in order; from the last one, to the caller."""
        if number == self.last:
            return [n for n in self.final if n in self.here]
        return [n for n in self.nodes if n in self.here and self.until.get(n, 0) > number]

    def _need(self, node: fx.Node, stage: int) -> None:
        if self._is_made_again(node):
            for operand in node.all_input_nodes:
                self._need(operand, stage)
        elif node.op != "get_attr":
            self.until[node] = max(self.until.get(node, 0), stage)

    def _is_made_again(self, node: fx.Node) -> bool:
        return node.op == "call_function" and node not in self.stage

    def _read(self, node: fx.Node, number: int, meta: Mapping[str, Any]) -> fx.Node:
        if not self._is_made_again(node):
            return self.here[node]
        if node not in self.again:
            # It stands within the module of its reader, whose operators torch wants in one piece.
            stack = meta.get("nn_module_stack", _ROOT)
            self.again[node] = self._copied(node, number, {**node.meta, "nn_module_stack": stack})
        return self.again[node]

    def _copied(self, node: fx.Node, number: int, meta: Mapping[str, Any]) -> fx.Node:
        copy = self.new.node_copy(node, lambda n: self._read(n, number, meta))
        copy.meta = {**meta, STAGE: number}
        return copy

    def _cloned(self, node: fx.Node, number: int) -> fx.Node:
        dense = {"memory_format": torch.contiguous_format}
        clone = self._called(aten.clone.default, self.here[node], f"{node.name}_relay", dense)
        self._mark(clone, number, value_of(node).clone(**dense))
        return clone

    def _called(
        self,
        function: Callable[..., Tensor],
        operand: fx.Node,
        name: str,
        options: dict[str, Any] | None = None,
    ) -> fx.Node:
        return self.new.create_node("call_function", function, (operand,), options, name)

    def _mark(self, node: fx.Node, number: int, value: object) -> None:
        node.meta |= {"val": value, "nn_module_stack": _ROOT, STAGE: number}

    def _can_be_sent(self, node: fx.Node) -> bool:
        value = value_of(node)
        if not isinstance(value, Tensor) or not value.is_contiguous():
            return False
        while node is not self.memory.owner[node]:  # what is written in place is no view by that
            if node in self.memory.views:
                return False
            node = node.all_input_nodes[0]
        return True

    def _is_read(self, node: fx.Node) -> bool:
        """Whether the stage itself reads what it returns.

        Where input gradients come before weight gradients, torch detaches in place what a stage has
        returned, and autograd then refuses to use it for the latter.
        """
        return (self.memory.owner[node], self.stage[node]) in self.reads

    def _read_inputs_in_order(self) -> None:
        """The first stage is called with the inputs in the order in which it reads them."""
        inputs = [
            n for n in self.new.nodes if n.op == "placeholder" and isinstance(value_of(n), Tensor)
        ]
        first = [n for n in self.new.nodes if n.meta.get(STAGE) == 0]
        read = [p for n in first for p in n.all_input_nodes if p.op == "placeholder"]
        if list(dict.fromkeys(read)) == inputs:
            return
        with self.new.inserting_before(first[0]):
            for node in inputs:
                alias = self._called(aten.alias.default, node, f"{node.name}_input")
                self._mark(alias, 0, value_of(node))
                node.replace_all_uses_with(alias, lambda user, alias=alias: user is not alias)
