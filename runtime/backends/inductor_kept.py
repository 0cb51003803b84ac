"""Engines of Inductor as data: graphs as the code generator gets them, which then finds its code.

A later process neither decomposes nor partitions. Inductor itself keeps the code under the text of
such a graph and the forms of its inputs, so that both processes compile what was read from data.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from torch import fx
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from graphopt.plan import Plan, Role
from graphopt.runtime.backends.inductor_code import (
    compile_backward,
    compile_forward,
    compiling,
    finish_inference,
    weights_of,
)
from graphopt.runtime.backends.kept_code import Code
from graphopt.runtime.backends.kept_engine import engine_of, inference_data, training_data
from graphopt.runtime.backends.kept_graph import graph_data, module_of, retold
from graphopt.runtime.backends.kept_words import Misfit, Unreadable, Untold
from graphopt.runtime.engine.halves import Halves
from graphopt.runtime.engine.step import Source
from graphopt.runtime.session import Session

log = logging.getLogger("graphopt")


# -- writing ---------------------------------------------------------------------------------------


def told_halves(halves: Halves, mode: FakeTensorMode) -> tuple[Halves, Any]:
    """Both halves as they are read from data, and the data; where they are none, the same halves.

    Args:
        halves: before code is made of them, which changes them.
        mode: of their values.
    """
    try:
        forward, backward = graph_data(halves.forward), graph_data(halves.backward)
        data = training_data(halves, lambda: forward, lambda: backward)
        data["surroundings"] = _surroundings()
        same = replace(
            halves,
            forward=retold(halves.forward, forward, mode),
            backward=retold(halves.backward, backward, mode),
        )
    except (Untold, Unreadable) as error:
        log.info("what Inductor compiles is not kept: %s", error)
        return halves, None
    return same, data


def told_inference(
    module: fx.GraphModule, prepared: fx.GraphModule, mode: FakeTensorMode
) -> tuple[fx.GraphModule, Any]:
    """An inference graph as it is read from data, and the data; see `told_halves`.

    Args:
        module: as it came from the passes.
        prepared: decomposed.
        mode: of their values.
    """
    try:
        forward = graph_data(prepared)
        data = inference_data(module, lambda: forward)
        data["surroundings"] = _surroundings()
        return retold(prepared, forward, mode), data
    except (Untold, Unreadable) as error:
        log.info("what Inductor compiles is not kept: %s", error)
        return prepared, None


def _surroundings() -> str:
    """What the graphs depend on beside those that the passes leave: settings of Inductor.

    Raises:
        Untold: they depend on code of somebody else's.
    """
    import torch._functorch.config
    from torch._inductor import config
    from torch._inductor.decomposition import select_decomp_table

    if any(getattr(config, name, None) is not None for name in _CUSTOM):
        raise Untold("a pass of somebody else's is set in Inductor")
    if not all(map(_is_torch, select_decomp_table().values())):
        raise Untold("a decomposition of somebody else's is registered in Inductor")
    return f"{config.get_hash().hex()} {torch._functorch.config.get_hash().hex()}"


_CUSTOM = ("joint_custom_pre_pass", "joint_custom_post_pass", "custom_partitioner_fn")


def _is_torch(rule: Callable[..., Any]) -> bool:
    if isinstance(rule, partial):
        return _is_torch(rule.func)
    return getattr(rule, "__module__", "").partition(".")[0] == "torch"


# -- reading ---------------------------------------------------------------------------------------


def engine_told(data: Any, plan: Plan, session: Session) -> Callable[..., Any]:
    """The engine that data is about.

    Raises:
        Unreadable: it is not what was written, or is not one of this plan.
        Misfit: it was made with other settings of Inductor.
        BackendError: Inductor cannot compile it.
    """
    mode = FakeTensorMode(shape_env=ShapeEnv())  # Inductor's cache is not read without one
    with compiling(mode, _device(data)):
        try:
            same = data["surroundings"] == _surroundings()
        except Untold as error:
            raise Misfit(str(error)) from error
        if not same:
            raise Misfit("Inductor has other settings by now")
        return engine_of(data, plan, session, _Readers(plan, mode))


def _device(data: Any) -> str:
    try:
        kinds = {str(form[-1]).partition(":")[0] for form in data["forward"]["forms"]}
    except (KeyError, IndexError, TypeError) as error:
        raise Unreadable("it has no inputs") from error
    return (kinds - {"cpu"} or kinds or {"cpu"}).pop()


@dataclass
class _Readers:
    """See `Readers`."""

    plan: Plan
    mode: FakeTensorMode
    strides: list[Any] = field(default_factory=list)

    def forward(self, data: Any, saved: int) -> Code:
        """See `Readers`."""
        module, results = module_of(data, self.mode), len(data["returns"])
        if self.plan.signature.names(Role.TANGENT):
            run, self.strides = compile_forward(module, saved, weights_of(self.plan))
        else:
            run = finish_inference(module, weights_of(self.plan), results)
        return Code(run, data["inputs"], results)

    def backward(self, data: Any, sources: tuple[Source, ...]) -> Code:
        """See `Readers`."""
        module, results = module_of(data, self.mode), len(data["returns"])
        run = compile_backward(module, sources, self.strides)
        return Code(run, data["inputs"], results)
