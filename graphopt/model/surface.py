"""The optimized model: the user's own object of its own class, with one attribute of its own.

Only ``forward`` changes, and only on this instance. So ``type(model) is Net`` holds, new instances
of the class are plain, and ``model.forward(x)`` (as adapters call it) is as optimized as
``model(x)``, hooks around it included. That is why it is neither a subclass (another class, whose
new instances had no captures to run) nor torch's ``_compiled_call_impl`` (which skips the hooks of
the model, and which ``model.forward`` and every wrapper of it pass by).
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import types
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from graphopt.capture import runs_plain
from graphopt.errors import ArgumentError
from graphopt.model.controller import KEY, Controller, controller_of, hooks_of
from graphopt.model.programs import bypassed, register, within_another_program
from graphopt.model.report import Report
from graphopt.model.specialiser import Specialiser
from graphopt.model.tree import model_html
from graphopt.model.unrun import Unrun

if TYPE_CHECKING:
    from graphopt.runtime.session import Session

Method = Callable[..., Any]


def install(model: nn.Module, compiler: Specialiser, session: Session) -> Controller:
    """Give the instance its forward; optimizing again replaces what was there.

    Raises:
        ArgumentError: somebody has wrapped the forward of an optimized model.
    """
    old = controller_of(model)
    if old is not None and not _same(model.__dict__.get("forward"), old.surface["forward"]):
        raise ArgumentError(
            "the forward of this optimized model was replaced on the instance, so it cannot be "
            "optimized again",
            hint="optimize first and wrap forward afterwards, or remove the wrapper",
        )
    if old is not None:
        old.session.settle()  # stages of other ranks have newer weights
    # Raises for a bad plugin, so it comes before the model is touched.
    offered = session.methods()
    restore(model)
    own = model.__dict__.get("forward")
    controller = Controller(plain_forward(model), compiler, session, own)
    controller.hooks = hooks_of(model)
    surface: dict[str, Method] = {
        "forward": _forward(controller, model),
        "__reduce_ex__": _reduce,
        "__deepcopy__": _deepcopy,
        "_replicate_for_data_parallel": _replicate,
        "__prepare_scriptable__": _refuse_script,
    }
    own_methods = {"explain": explain, "_repr_html_": _repr_html}
    methods = own_methods | {n: _offered(o, n, kind) for n, (o, kind) in offered}
    surface |= {name: method for name, method in methods.items() if not _has_own(model, name)}
    controller.surface = {n: types.MethodType(method, model) for n, method in surface.items()}
    model.__dict__.update({KEY: controller, **controller.surface})
    controller.unrun = Unrun(model, controller.note)
    return controller


def plain_forward(model: nn.Module) -> Method:
    """The forward that the user wrote, unbound: of the class, or one put on the instance."""
    controller = controller_of(model)
    if controller is not None:
        return controller.plain
    own = model.__dict__.get("forward")
    if own is None:
        return type(model).forward
    if isinstance(own, types.MethodType) and own.__self__ is model:
        return own.__func__

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return own(*args, **kwargs)

    return forward


def _has_own(model: nn.Module, name: str) -> bool:
    """Whether the model has an attribute, parameter, buffer or submodule of this name."""
    own = model.__dict__
    inside = any(name in own[table] for table in ("_parameters", "_buffers", "_modules"))
    return inside or name in own or hasattr(type(model), name)


def _forward(controller: Controller, model: nn.Module) -> Method:
    plain, number = controller.plain, register(controller)
    # A descriptor may give another object each time.
    of_class = controller.own is None and plain is type(model).forward

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            bypassed(number)
            return (type(self).forward if of_class else plain)(self, *args, **kwargs)
        if of_class and type(self).forward is not controller.plain:
            controller.replaced(type(self).forward)
        # In a job a plain step would leave gradients unreduced; there such a call is refused.
        plainly = runs_plain() and not controller.session.ranks
        if plainly or within_another_program():
            controller.called()
            return controller.plain(self, *args, **kwargs)
        return controller(self, args, kwargs)

    # Not functools.wraps: who unwraps (accelerate does) would find the plain forward and keep it.
    shown = controller.own or plain
    for name in ("__module__", "__name__", "__qualname__", "__doc__"):
        setattr(forward, name, getattr(shown, name, getattr(forward, name)))
    if hasattr(controller.own, "__wrapped__"):
        # Optimized in its wrapping: who takes that off (accelerate does) wants what is inside.
        forward.__wrapped__ = plain  # type: ignore[attr-defined]
    with contextlib.suppress(TypeError, ValueError):  # a forward without Python code
        forward.__signature__ = _signature(controller)  # type: ignore[attr-defined]
    return forward


def _signature(controller: Controller) -> inspect.Signature:
    """Of the unbound forward; one on the instance gets the `self` that it lacks."""
    own = controller.own
    if own is None or isinstance(own, types.MethodType):
        return inspect.signature(controller.plain)
    signature = inspect.signature(own)
    kind = inspect.Parameter.POSITIONAL_ONLY
    parameters = [inspect.Parameter("self", kind), *signature.parameters.values()]
    return signature.replace(parameters=parameters)


def explain(self: nn.Module) -> str:
    """What graphopt did to this model, what it declined, and why."""
    return report(self).explain()


def _repr_html(self: nn.Module) -> str:
    """The model in a notebook; IPython asks the instance for it."""
    return model_html(self, report(self))


def _reduce(self: nn.Module, protocol: Any) -> Any:
    """Pickle as the plain model: a capture belongs to a process."""
    reduced = cast("tuple[Any, ...]", type(self).__reduce_ex__(self, protocol))
    if len(reduced) < 3:
        return reduced
    constructor, arguments, state, *rest = reduced
    return (constructor, arguments, _plain_state(self, state), *rest)


def _plain_state(model: nn.Module, state: Any) -> Any:
    """The attributes of a model without what `install` has put there."""
    controller = controller_of(model)
    if controller is None or not isinstance(state, Mapping):
        return state
    ours = controller.surface
    kept = {k: v for k, v in state.items() if k != KEY and not _same(v, ours.get(k))}
    if controller.own is not None and "forward" not in kept:
        kept["forward"] = controller.own
    for table in ("_state_dict_pre_hooks", "_load_state_dict_pre_hooks"):
        hooks = kept.get(table, {})
        own = {n: h for n, h in hooks.items() if not _of_graphopt(h)}
        if len(own) < len(hooks):
            kept[table] = type(hooks)(own)
    return kept


def _of_graphopt(hook: object) -> bool:
    """Whether a part has hung it on the model; torch wraps some hooks."""
    return hasattr(getattr(hook, "hook", hook), "of_graphopt")


def _same(value: object, method: types.MethodType | None) -> bool:
    return method is not None and getattr(value, "__func__", None) is method.__func__


def _deepcopy(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """Copy as an optimized model with its own captures and its own pass state."""
    controller = controller_of(self)
    assert controller is not None
    controller.session.settle()
    own = getattr(type(self), "__deepcopy__", None)
    if own is not None:
        plain: nn.Module = own(self, memo)
        plain.__dict__ = dict(_plain_state(self, plain.__dict__))
    else:
        constructor, arguments, state, *_ = _reduce(self, 4)
        plain = constructor(*arguments)
        memo[id(self)] = plain
        plain.__setstate__(copy.deepcopy(state, memo))  # type: ignore[no-untyped-call]
    twin = install(plain, controller.compiler, controller.session.copy(memo))
    twin.trained = controller.trained
    return plain


def _replicate(self: nn.Module) -> nn.Module:
    """A replica of `nn.DataParallel` shares the attributes of the model; it must run plain."""
    replica: nn.Module = type(self)._replicate_for_data_parallel(self)  # type: ignore[no-untyped-call]
    replica.__dict__ = dict(_plain_state(self, replica.__dict__))
    return replica


def _refuse_script(self: nn.Module) -> nn.Module:
    """What `torch.jit.script` asks for; a plain copy would stay inside of what holds the model."""
    raise ArgumentError(
        "torch.jit.script compiles the source of forward, and the forward of an optimized model "
        "has none of its own",
        hint="torch.export.export(model, inputs); or torch.jit.script before optimize, on a copy",
    )


def _offered(owner: str, name: str, kind: type) -> Method:
    """A method of the runtime part `owner` as one of the model."""

    @functools.wraps(getattr(kind, name))
    def method(self: nn.Module, *args: Any, **kwargs: Any) -> object:
        controller = controller_of(self)
        assert controller is not None
        return getattr(controller.session.part(owner), name)(*args, **kwargs)

    return method


def restore(model: nn.Module) -> None:
    """Give the model back as it was before it was optimized."""
    controller = controller_of(model)
    if controller is None:
        return
    for handle in (*controller.session.handles, *filter(None, (controller.unrun,))):
        handle.remove()
    del model.__dict__[KEY]
    for name, method in controller.surface.items():
        if _same(model.__dict__.get(name), method):
            del model.__dict__[name]
    if controller.own is not None and "forward" not in model.__dict__:
        model.__dict__["forward"] = controller.own


def report(model: nn.Module) -> Report:
    """The report of an optimized model; raises ``ArgumentError`` for any other."""
    controller = controller_of(model)
    if controller is None:
        raise ArgumentError(
            f"this {type(model).__name__} is not optimized",
            hint="call graphopt.optimize(model) first",
        )
    return controller.report(model)
