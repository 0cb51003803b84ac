"""The second way in: `torch.export`, for models that Dynamo's capture refuses.

Export's non-strict tracing runs forward as Python, so it captures some models that Dynamo cannot
read (locks, caches, loggers). It has two traps, both closed here: it silently drops the backward of
a custom `autograd.Function`, so models that run one are refused; and its graph carries no guards,
so a fingerprint of everything that forward could have read is compared at each call.
"""

from __future__ import annotations

import contextlib
import io
import logging
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._guards import TracingContext
from torch._subclasses import FakeTensorMode
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from graphopt.capture.flat import FlatForward, Runner, name_inputs
from graphopt.capture.opaque import capturable_leaves, replace_leaves
from graphopt.errors import CaptureError
from graphopt.model.trial import Trial, tensors_of


def by_export(
    model: nn.Module,
    forward: Callable[..., object],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    refusal: CaptureError,
) -> FlatForward:
    """Capture by `torch.export`, or raise `refusal`, which says why Dynamo could not."""
    function = _custom_function(model, forward, args, kwargs)
    if function:
        refusal.hint += f" (torch.export would drop the backward of {function})"
        raise refusal
    # Export calls model.forward, which optimize() may have replaced on the class.
    object.__setattr__(model, "forward", types.MethodType(forward, model))
    try:
        with capturable_leaves(), _quietly():
            program = torch.export.export(model, args, kwargs, strict=False)
    except Exception as error:
        raise refusal from error
    finally:
        object.__delattr__(model, "forward")

    specs = program.graph_signature.input_specs
    constants = {**program.state_dict, **program.constants}
    spec_of_outputs = program.call_spec.out_spec
    assert spec_of_outputs is not None
    positions = [s.target if s.kind is not InputKind.USER_INPUT else None for s in specs]

    def flatten(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        leaves: Iterator[Any] = iter(pytree.tree_leaves((args, kwargs)))
        return [
            next(leaves) if name is None else _attribute(model, name, constants)
            for name in positions
        ]

    def bind(runner: Runner) -> Callable[..., object]:
        def call(model: nn.Module, *args: Any, **kwargs: Any) -> object:
            inputs = [t for t in flatten(model, args, kwargs) if isinstance(t, Tensor)]
            return pytree.tree_unflatten(list(runner(inputs)), spec_of_outputs)

        return call

    module = program.graph_module
    replace_leaves(module)
    names = []
    for node, value in zip(
        module.graph.find_nodes(op="placeholder"), flatten(model, args, kwargs), strict=True
    ):
        if isinstance(value, Tensor):
            names.append(node.name)
        else:  # a constant of the call, specialised; the fingerprint holds it
            module.graph.erase_node(node)
    module.recompile()
    inputs = [t for t in flatten(model, args, kwargs) if isinstance(t, Tensor)]
    expected = _fingerprint(model, args, kwargs)
    return FlatForward(
        module=module,
        slots=name_inputs(model, inputs, names),
        inputs=tuple(inputs),
        context=TracingContext(FakeTensorMode(allow_non_fake_inputs=True)),
        route="export",
        bind=bind,
        holds=lambda m, *a, **k: _fingerprint(m, a, k) == expected,
        failure=lambda *_: "the inputs, the mode or an attribute of a module changed",
        notes=(f"captured by torch.export, because Dynamo refused: {refusal.message}",),
    )


def _attribute(model: nn.Module, name: str, constants: dict[str, Any]) -> Any:
    owner, _, leaf = name.rpartition(".")
    try:
        return getattr(model.get_submodule(owner), leaf)
    except AttributeError:
        return constants[name]


def _custom_function(
    model: nn.Module, forward: Callable[..., object], args: Sequence[Any], kwargs: dict[str, Any]
) -> str:
    """Name of a custom `autograd.Function` that one eager call runs; ``""`` when there is none."""
    if not torch.is_grad_enabled():
        return ""
    with Trial(model, args, kwargs).untouched():
        outputs = forward(model, *args, **kwargs)
    queue: list[Any] = [tensor.grad_fn for _, tensor in tensors_of(outputs)]
    seen = set()
    while queue:
        node = queue.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            return type(node).__name__.removesuffix("Backward")
        queue.extend(parent for parent, _ in node.next_functions)
    return ""


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Keep what export prints and logs about a model that it refuses too; the refusal says it."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            contextlib.redirect_stderr(io.StringIO()),
            contextlib.redirect_stdout(io.StringIO()),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


_PLAIN = (bool, int, float, str, type(None))


def _fingerprint(model: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> object:
    """Everything that can make forward take another path, as one comparable value."""
    leaves, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
    modules = [
        (
            type(module),
            tuple((k, v) for k, v in module.__dict__.items() if isinstance(v, _PLAIN)),
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
        )
        for module in model.modules()
    ]
    return (
        spec,
        [_describe(leaf) for leaf in leaves],
        modules,
        [_describe(t) for t in (*model.parameters(), *model.buffers())],
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
        torch.get_autocast_dtype("cpu"),
    )


def _describe(value: object) -> object:
    if isinstance(value, Tensor):
        return (value.shape, value.stride(), value.dtype, value.device, value.requires_grad)
    return value
