"""Faults put into passes, backends and runtime parts, to see who finds them."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, fx, nn

from graphopt import registry
from graphopt.graph import Graph, Level
from graphopt.passbase import EXACT, Applied, Numerics, Outcome, Pass, PassContext, lowered
from graphopt.plan import Plan, Role
from graphopt.rewrite import emit
from graphopt.runtime.backends.eager import Eager
from graphopt.runtime.engine.step import Half
from graphopt.runtime.session import Session

aten = torch.ops.aten
# What operators of late faults have been called so often.
CALLS = [0]

_library: Any = torch.library.Library("faults", "DEF")  # type: ignore[no-untyped-call]
_library.define("late(Tensor x, int after) -> Tensor")


def _late(x: Tensor, after: int) -> Tensor:
    CALLS[0] += 1
    return x * 1.25 if CALLS[0] > after else x.clone()


_library.impl("late", _late, "CPU")
_library.impl("late", lambda x, after: torch.empty_like(x), "Meta")


class Net(nn.Module):
    """Layers of one shape, whose gradients may be swapped, and a norm with buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.bn = nn.Linear(8, 8), nn.Linear(8, 8), nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(torch.relu(self.bn(self.a(x)))) * 0.5
        return out


def _gradient(graph: Graph, name: str) -> int:
    return graph.signature.output_index(Role.GRAD, name)


def scaled_gradient(graph: Graph, outputs: list[fx.Node]) -> None:
    place = _gradient(graph, "a.weight")
    with graph.fx.inserting_before(graph.output):
        outputs[place] = emit(graph, aten.mul.Tensor, outputs[place], 1.01, like=outputs[place])


def dropped_term(graph: Graph, outputs: list[fx.Node]) -> None:
    place = _gradient(graph, "b.bias")
    with graph.fx.inserting_before(graph.output):
        outputs[place] = emit(graph, aten.mul.Tensor, outputs[place], 0.0, like=outputs[place])


def swapped_tensors(graph: Graph, outputs: list[fx.Node]) -> None:
    i, j = _gradient(graph, "a.weight"), _gradient(graph, "b.weight")
    outputs[i], outputs[j] = outputs[j], outputs[i]


def wrong_output(graph: Graph, outputs: list[fx.Node]) -> None:
    place = graph.signature.output_index(Role.OUTPUT, "0")
    with graph.fx.inserting_after(outputs[place]):
        outputs[place] = emit(graph, aten.mul.Tensor, outputs[place], 1.01, like=outputs[place])


def large_values(graph: Graph, outputs: list[fx.Node]) -> None:
    node = next(n for n in graph.operators if n.target is aten.relu.default)
    node.target, node.args = aten.clamp.default, (node.args[0], 0, 50.0)


def late(graph: Graph, outputs: list[fx.Node]) -> None:
    place = _gradient(graph, "a.weight")
    with graph.fx.inserting_before(graph.output):
        operator = torch.ops.faults.late.default
        outputs[place] = emit(graph, operator, outputs[place], 14, like=outputs[place])


FAULTS: dict[str, Callable[[Graph, list[fx.Node]], None]] = {
    f.__name__: f
    for f in (scaled_gradient, dropped_term, swapped_tensors, wrong_output, large_values, late)
}


@dataclass(frozen=True)
class Faulty(Pass):
    """Makes one fault and promises to make none.

    Attributes:
        fault: which one.
        level: of the graphs that it is made in.
        promise: ``"exact"`` or ``"lowered"``.
        only: the rank that makes it; by default all do.
    """

    name: ClassVar[str] = "faulty"
    levels: ClassVar[frozenset[str]] = frozenset({"joint", "inference"})

    fault: str
    level: str = "joint"
    promise: str = "exact"
    only: int = -1

    @property
    def numerics(self) -> Numerics:  # type: ignore[override]
        return EXACT if self.promise == "exact" else lowered(1e-3)

    def apply(self, graph: Graph, ctx: PassContext) -> Outcome:
        elsewhere = self.only >= 0 and dist.get_rank() != self.only
        if graph.level is not Level(self.level) or elsewhere:
            return Outcome()
        outputs = list(graph.outputs)
        FAULTS[self.fault](graph, outputs)
        graph.output.args = (outputs,)
        return Outcome((Applied("x", "broke"),))


def _changed(module: fx.GraphModule, change: Callable[[fx.Graph], None]) -> fx.GraphModule:
    copy = fx.GraphModule(module, fx.Graph())
    copy.graph.output(copy.graph.graph_copy(module.graph, {}))
    change(copy.graph)
    copy.recompile()
    return copy


def _no_relu(graph: fx.Graph) -> None:
    for node in graph.find_nodes(op="call_function", target=aten.relu.default):
        node.target = aten.neg.default


def _no_threshold(graph: fx.Graph) -> None:
    for node in graph.find_nodes(op="call_function", target=aten.threshold_backward.default):
        node.args = (*node.args[:2], -100.0)


class WrongForward(Eager):
    name = "wrong_forward"
    _change = staticmethod(_no_relu)

    def build(self, module: fx.GraphModule, plan: Plan, session: Session) -> Callable[..., Any]:
        return super().build(_changed(module, self._change), plan, session)


class WrongBackward(WrongForward):
    name = "wrong_backward"
    _change = staticmethod(_no_threshold)


class WrongReducing(Eager):
    """Right, except for what sends messages."""

    name = "wrong_reducing"

    def build(self, module: fx.GraphModule, plan: Plan, session: Session) -> Callable[..., Any]:
        from graphopt.runtime.backends import eager

        before = eager.boxed

        def wrong(form: fx.GraphModule) -> Any:
            run = before(form)
            if not any("all_reduce" in str(n.target) for n in form.graph.nodes):
                return run
            return lambda arguments: [
                r * 1.01 if isinstance(r, Tensor) and r.is_floating_point() else r
                for r in run(arguments)
            ]

        eager.boxed = wrong
        try:
            return super().build(module, plan, session)
        finally:
            eager.boxed = before


BACKENDS = {kind.name: kind for kind in (WrongForward, WrongBackward, WrongReducing)}


def with_backends(patch: Callable[[object, str, object], None]) -> None:
    """Have the wrong backends known by name."""
    get, names = registry.get, registry.names
    patch(registry, "get", lambda n, t=registry.PASSES: BACKENDS.get(n) or get(n, t))
    patch(registry, "names", lambda t=registry.PASSES: (*names(t), *BACKENDS))


# -- runtime parts ---------------------------------------------------------------------------------


def place(name: str) -> Any:
    """A module or a class of the runtime that a fault is put into, by its name there."""
    return pkgutil.resolve_name(f"graphopt.runtime.{name}")


def swap_in(make: Callable[..., Half]) -> Callable[..., Half]:
    """What makes a form, with two gradients of one shape in each other's places."""

    def wrong(*args: Any) -> Half:
        half = make(*args)
        output = half.module.graph.output_node()
        values = list(output.args[0])  # type: ignore[arg-type]
        for role in (Role.GRAD, Role.LOCAL):
            found = [(i, s.name) for i, s in enumerate(half.slots) if s.role is role]
            places = [i for i, name in found if name in ("a.weight", "b.weight")]
            if len(places) == 2:
                i, j = places
                values[i], values[j] = values[j], values[i]
        output.args = (tuple(values),)
        half.module.recompile()
        return half

    return wrong
