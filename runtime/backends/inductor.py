"""PyTorch's own code generator: Triton on GPUs, C++ on CPUs.

The joint graph reaches Inductor after the passes. It is decomposed, then partitioned by the min-cut
partitioner after Inductor's joint-graph passes, as `torch.compile` does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, cast

from torch import fx
from torch._subclasses import FakeTensorMode

from graphopt.errors import BackendError
from graphopt.plan import Plan, Role
from graphopt.runtime.backends import Backend
from graphopt.runtime.backends.eager import boxed
from graphopt.runtime.backends.inductor_code import (
    compile_backward,
    compile_forward,
    compiling,
    decompose,
    device_of,
    finish_inference,
    mode_of,
    prepare_inference,
    settings,
    weights_of,
)
from graphopt.runtime.backends.inductor_frozen import frozen_inference
from graphopt.runtime.backends.inductor_kept import (
    engine_told,
    told_halves,
    told_inference,
)
from graphopt.runtime.engine.build import inference, training
from graphopt.runtime.engine.halves import split
from graphopt.runtime.engine.step import Executable
from graphopt.runtime.frozen.prologue import is_marked
from graphopt.runtime.session import Session


class Inductor(Backend):
    """Compiles both halves."""

    name: ClassVar[str] = "inductor"
    symbolic: ClassVar[bool] = True

    def build(self, module: fx.GraphModule, plan: Plan, session: Session) -> Callable[..., Any]:
        """See `Backend.build`."""
        mode = mode_of(module)
        with compiling(mode, device_of(module)):
            if plan.signature.names(Role.TANGENT):
                return _training(module, plan, session, mode)
            if is_marked(module):
                return inference(plan, session, module, lambda graph: _frozen(graph, plan))
            return _inference(module, plan, session, mode)

    def kept(self, data: object, plan: Plan, session: Session) -> Callable[..., Any]:
        """See `Backend.kept`."""
        return engine_told(data, plan, session)

    def function(self, module: fx.GraphModule) -> Executable:
        """See `Backend.function`."""
        returned = cast("Sequence[Any]", module.graph.output_node().args[0])
        if not any(node.op == "call_function" for node in module.graph.nodes):
            return boxed(module)  # it only passes on what it is given
        with compiling(mode_of(module), device_of(module)):
            return finish_inference(prepare_inference(module), (), len(returned))


def _training(
    module: fx.GraphModule, plan: Plan, session: Session, mode: FakeTensorMode
) -> Callable[..., Any]:
    from torch._inductor.compile_fx import partition_fn

    halves = split(decompose(module), plan.signature, partition_fn)
    told: Any = None
    if not plan.parts:
        halves, told = told_halves(halves, mode)
    saved = sum(kind == "saved" for kind, _ in halves.sources)
    strides: list[Any] = []

    def forward(half: fx.GraphModule) -> Executable:
        compiled, layouts = compile_forward(half, saved, weights_of(plan))
        if strides and str(strides) != str(layouts):  # to compare symbols would fix them
            raise BackendError(
                "Inductor saves values of two forms of this forward in different layouts",
                hint="use backend='eager'",
            )
        strides[:] = layouts
        return compiled

    def backward(form: fx.GraphModule) -> Executable:
        # Forms that accumulate gradients are made in the middle of a step.
        with settings(mode):
            return compile_backward(form, halves.sources, strides)

    engine = training(plan, session, halves, forward, backward)
    engine.data = (lambda: told) if told is not None else None
    return engine


def _inference(
    module: fx.GraphModule, plan: Plan, session: Session, mode: FakeTensorMode
) -> Callable[..., Any]:
    outputs = len(plan.signature.outputs)
    prepared, told = told_inference(module, prepare_inference(module), mode)
    run = finish_inference(prepared, weights_of(plan), outputs)
    engine = inference(plan, session, module, lambda _: run)
    engine.data = (lambda: told) if told is not None else None
    return engine


def _frozen(module: fx.GraphModule, plan: Plan) -> Executable:
    outputs = len(plan.signature.outputs)

    def finish(prepared: fx.GraphModule, kept: Sequence[int]) -> Executable:
        return finish_inference(prepared, [*weights_of(plan), *kept], outputs)

    return frozen_inference(module, prepare_inference, finish)
