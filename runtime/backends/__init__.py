"""Backends turn a joint or inference graph into an engine: one module each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, cast

from torch import fx

from graphopt import registry
from graphopt.plan import Plan
from graphopt.runtime.engine.build import stack
from graphopt.runtime.engine.step import Executable
from graphopt.runtime.session import Session


class Backend:
    """Base of all backends.

    Class attributes:
        name: how users ask for it.
        symbolic: whether it takes graphs in which sizes of inputs are symbols.
    """

    name: ClassVar[str]
    symbolic: ClassVar[bool] = False

    def build(self, module: fx.GraphModule, plan: Plan, session: Session) -> Callable[..., Any]:
        """An engine; the module is copied, not changed.

        Raises:
            BackendError: it cannot run this graph on this machine.
        """
        raise NotImplementedError

    def kept(self, data: object, plan: Plan, session: Session) -> Callable[..., Any]:
        """The engine that an earlier process has built, from what `Engine.data` of it has told.

        Raises:
            Unreadable: it is none, or not one for this plan.
            Misfit: it was built in other surroundings.
            BackendError: it cannot run this graph on this machine.
        """
        raise NotImplementedError

    def function(self, module: fx.GraphModule) -> Executable:
        """A graph without autograd, such as a part of a half, as a function.

        Its results have the strides that the graph records. The module becomes its own.

        Raises:
            BackendError: it cannot run this graph on this machine.
        """
        raise NotImplementedError


def build(module: fx.GraphModule, plan: Plan, session: Session | None = None) -> Callable[..., Any]:
    """An engine of the plan's backend, with all runtime parts around.

    Args:
        module: a joint or inference module.
        plan: what to obey.
        session: of the model; a new one where none is given.

    Raises:
        BackendError: the backend cannot run this graph on this machine.
        PluginError: a runtime part is missing, or is of another version than its plan part.
        StateError: another state was loaded than this plan needs.
    """
    session = session or Session()
    values = [node.meta.get("val") for node in module.graph.find_nodes(op="placeholder")]
    session.check_inputs(plan, values)
    backend = cast("Backend", registry.get(plan.backend, registry.BACKENDS)())

    def innermost(module: fx.GraphModule, plan: Plan) -> Callable[..., Any]:
        return backend.build(module, plan, session)

    return stack(plan, session, "engine", innermost)(module, plan)
