"""Operators that are opaque in the graph and exactly PyTorch eager inside, backward included.

Some functions must not be decomposed when a step is captured: a recurrent network would unroll over
time and lose its dropout, a CTC loss has intermediate shapes that depend on data. `define` turns
such a function into one forward node and one backward node:

    NAME(PARAMETERS, ScalarType? autocast, bool[] wanted) -> (Tensor, ..., Tensor tape)
    NAME_backward(Tensor?[] grads, bool[] wanted, PARAMETERS, ScalarType? autocast, Tensor tape)
        -> Tensor[]

``autocast`` is the autocast dtype under which the function runs, ``None`` for no autocast.
``wanted`` has one entry per tensor among the parameters, in order: whether a gradient will be asked
for it. The caller passes ``None`` and ``[]``; the dispatcher's autocast and autograd kernels, which
run when a graph is captured, fill them in. The backward returns the wanted gradients, in order.

Both kernels run the eager function under autograd, so results are bit-equal to eager's. Both are
pure functions of their arguments: ``tape`` holds the state of the random generator before the
forward, from which the backward can repeat it. As a cache, the forward leaves autograd's own record
on the tape tensor. The backward uses it once, provided that its tensors are still the recorded
ones, and then costs the same as in eager; recomputing would add a forward to every step. A
hand-written backward over `aten` operators would serve one device and one mode each, and CPU GRU
has none to build on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from graphopt.errors import DoubleBackwardError
from graphopt.ops.record import Function, Invocation, Record, tensors_of

# Typed `Any` because torch leaves the methods of `Library` untyped.
_library: Any = torch.library.Library("graphopt", "FRAGMENT")  # type: ignore[no-untyped-call]

_RECORD = "_graphopt_record"


def define(name: str, parameters: str, outputs: int, function: Function) -> None:
    """Register ``graphopt::NAME`` and ``graphopt::NAME_backward`` with all their kernels.

    Args:
        name: the operator, with ``.OVERLOAD`` appended where there are several.
        parameters: in schema language, without defaults; the first tensor decides the device.
        outputs: how many tensors `function` returns.
        function: what it computes.
    """
    packet, _, overload = name.partition(".")
    name_backward = f"{packet}_backward.{overload}" if overload else f"{packet}_backward"
    returns = ", ".join(["Tensor"] * (outputs + 1))
    parameters += ", ScalarType? autocast"
    _library.define(
        f"{name}({parameters}, bool[] wanted) -> ({returns})",
        tags=(torch.Tag.nondeterministic_seeded, torch.Tag.pt2_compliant_tag),
    )
    _library.define(
        f"{name_backward}(Tensor?[] grads, bool[] wanted, {parameters}, Tensor tape) -> Tensor[]",
        tags=torch.Tag.pt2_compliant_tag,
    )
    operators = torch.ops.graphopt
    forward_op = getattr(getattr(operators, packet), overload or "default")
    backward_op = getattr(getattr(operators, f"{packet}_backward"), overload or "default")

    def forward(*args: Any) -> tuple[Tensor, ...]:
        *parameters, autocast, wanted = args
        call = Invocation(function, parameters, autocast)
        tape = call.random_state()
        if not any(wanted) or torch.is_inference_mode_enabled():
            return (*call.run(), tape)
        record = call.record(wanted)
        setattr(tape, _RECORD, record)
        # Copies: what autograd recorded must stay, even if the graph reuses an output's memory.
        return (*(output.detach().clone() for output in record.outputs), tape)

    def forward_fake(*args: Any) -> tuple[Tensor, ...]:
        *parameters, autocast, _ = args
        call = Invocation(function, parameters, autocast)
        return (*call.fake(), call.fake_random_state())

    def backward(
        grads: Sequence[Tensor | None], wanted: Sequence[bool], *args: Any
    ) -> list[Tensor]:
        *parameters, autocast, tape = args
        call = Invocation(function, parameters, autocast)
        record: Record | None = tape.__dict__.pop(_RECORD, None)
        if record is None or not record.is_of(call.tensors, wanted):
            record = call.repeat(wanted, tape)
        return [call.arrange(g, i) for i, g in record.differentiate(grads, wanted).items()]

    def backward_fake(grads: object, wanted: Sequence[bool], *args: Any) -> list[Tensor]:
        *parameters, autocast, _ = args
        call = Invocation(function, parameters, autocast)
        tensors = zip(call.tensors, wanted, strict=True)
        return [
            call.arrange(tensor.new_empty(tensor.shape), i)
            for i, (tensor, want) in enumerate(tensors)
            if want
        ]

    def autograd(*args: Any) -> tuple[Tensor, ...]:
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors_of(args)):
            leaves, spec = pytree.tree_flatten(args[:-1])
            outputs = _Differentiable.apply(  # type: ignore[no-untyped-call]
                forward_op, backward_op, spec, *leaves
            )
            return tuple(outputs)
        with torch._C._AutoDispatchBelowAutograd():
            return tuple(forward_op(*args))

    def autocast(*args: Any) -> tuple[Tensor, ...]:
        *parameters, dtype, wanted = args
        device = tensors_of(parameters)[0].device.type
        dtype = dtype or torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            return tuple(forward_op(*parameters, dtype, wanted))

    _library.impl(name, forward, "CompositeExplicitAutograd")
    _library.impl(name, autograd, "Autograd")
    _library.impl(name, autocast, "AutocastCPU")
    _library.impl(name, autocast, "AutocastCUDA")
    _library.impl(name_backward, backward, "CompositeExplicitAutograd")
    torch.library.register_fake(f"graphopt::{name}", forward_fake, lib=_library)
    torch.library.register_fake(f"graphopt::{name_backward}", backward_fake, lib=_library)


class _Differentiable(torch.autograd.Function):
    """The forward operator with `wanted` filled in, and the backward operator."""

    @staticmethod
    def forward(ctx: Any, forward_op: Any, backward_op: Any, spec: Any, *leaves: Any) -> Any:
        ctx.needed = ctx.needs_input_grad[3:]
        ctx.wanted = [
            needed
            for needed, leaf in zip(ctx.needed, leaves, strict=True)
            if isinstance(leaf, Tensor)
        ]
        with torch._C._AutoDispatchBelowAutograd():
            outputs = tuple(forward_op(*pytree.tree_unflatten(leaves, spec), ctx.wanted))
        ctx.mark_non_differentiable(outputs[-1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors_of(leaves), outputs[-1])
        ctx.backward_op, ctx.spec = backward_op, spec
        ctx.constants = [None if isinstance(leaf, Tensor) else (leaf,) for leaf in leaves]
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        if torch.is_grad_enabled():
            raise DoubleBackwardError(
                f"gradients of {ctx.backward_op} cannot be differentiated again",
                hint="compute the first gradient without create_graph=True",
            )
        *tensors, tape = ctx.saved_tensors
        saved = iter(tensors)
        leaves = [next(saved) if held is None else held[0] for held in ctx.constants]
        call = pytree.tree_unflatten(leaves, ctx.spec)
        found = iter(ctx.backward_op(list(grads[:-1]), ctx.wanted, *call, tape))
        return None, None, None, *(next(found) if needed else None for needed in ctx.needed)
