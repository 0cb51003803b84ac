"""Small graphs made by hand, without capture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from graphopt.graph import Graph, Level
from graphopt.plan import Phase, Role, Signature, Slot

aten = torch.ops.aten
TAGS = {Phase.FORWARD: "is_forward", Phase.BACKWARD: "is_backward"}


def operator_name(target: object) -> str:
    """How capture names the nodes of an operator."""
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.split("::")[1]
    return target.__name__


class Builder:
    """Builds one graph node by node; every node gets its fake value and its phase."""

    def __init__(self) -> None:
        self.mode = FakeTensorMode()
        self.fx = fx.Graph()
        self.module = torch.nn.Module()
        self.inputs: list[Slot] = []

    def input(
        self,
        role: Role,
        name: str,
        shape: Sequence[int],
        dtype: torch.dtype = torch.float32,
    ) -> fx.Node:
        phase = Phase.BACKWARD if role is Role.TANGENT else Phase.FORWARD
        self.inputs.append(Slot(role, name, phase))
        node = self.fx.placeholder(f"{role}_{name}".replace(".", "_"))
        with self.mode:
            node.meta["val"] = torch.empty(tuple(shape), dtype=dtype)
        node.meta["partitioner_tag"] = TAGS[phase]
        return node

    def constant(self, name: str, value: torch.Tensor) -> fx.Node:
        self.module.register_buffer(name, value)
        node = self.fx.get_attr(name)
        node.meta.update(val=self.mode.from_tensor(value), partitioner_tag="is_forward")
        return node

    def subgraph(self, name: str, module: fx.GraphModule) -> fx.Node:
        self.module.add_module(name, module)
        node = self.fx.get_attr(name)
        node.meta["partitioner_tag"] = "is_forward"
        return node

    def call(
        self, target: object, *args: object, phase: Phase = Phase.FORWARD, **kwargs: object
    ) -> fx.Node:
        name = operator_name(target)
        node = self.fx.create_node("call_function", target, args, kwargs, name=name)

        def value(used: fx.Node) -> object:
            return used.meta.get("val", getattr(self.module, str(used.target), None))

        with self.mode, torch.no_grad():
            node.meta["val"] = target(*fx.map_arg(args, value), **fx.map_arg(kwargs, value))
        node.meta["partitioner_tag"] = TAGS[phase]
        return node

    def backward(self, target: object, *args: object, **kwargs: object) -> fx.Node:
        return self.call(target, *args, phase=Phase.BACKWARD, **kwargs)

    def build(self, outputs: Mapping[Slot, fx.Node], level: Level = Level.JOINT) -> Graph:
        self.fx.output(list(outputs.values()))
        signature = Signature(tuple(self.inputs), tuple(outputs))
        return Graph(fx.GraphModule(self.module, self.fx), signature, level)


def output(name: str = "0") -> Slot:
    return Slot(Role.OUTPUT, name)


def grad(name: str) -> Slot:
    return Slot(Role.GRAD, name, Phase.BACKWARD)


def mutation(name: str, phase: Phase = Phase.FORWARD) -> Slot:
    return Slot(Role.MUTATION, name, phase)


def linear_graph() -> Graph:
    """``y = x @ w`` with the gradient of ``w``."""
    b = Builder()
    w = b.input(Role.PARAM, "w", (3, 2))
    x = b.input(Role.INPUT, "0", (4, 3))
    tangent = b.input(Role.TANGENT, "0", (4, 2))
    y = b.call(aten.mm.default, x, w)
    xt = b.backward(aten.t.default, x)
    gw = b.backward(aten.mm.default, xt, tangent)
    return b.build({output(): y, grad("w"): gw})


def inference_graph() -> Graph:
    """``y = relu(x @ w)`` without backward."""
    b = Builder()
    w = b.input(Role.PARAM, "w", (3, 2))
    x = b.input(Role.INPUT, "0", (4, 3))
    y = b.call(aten.relu.default, b.call(aten.mm.default, x, w))
    return b.build({output(): y}, Level.INFERENCE)
