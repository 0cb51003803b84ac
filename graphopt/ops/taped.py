"""Operators that are opaque in the graph and exactly PyTorch eager inside, backward included.

Some functions must not be taken apart when a step is captured: a recurrent network would unroll
over time and lose its dropout, a CTC loss has intermediate shapes that depend on data. `define`
makes such a function one forward node and one backward node:

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
ones, and so costs what it costs in eager. Always repeating the forward was measured instead: steps
of two-layer networks (T 100 to 200, H 128 to 256, CPU) took 1.24 times as long for GRU, 1.26 to
1.53 times for LSTM. A hand-written backward over `aten` operators would serve one device and one
mode each, and CPU GRU has none to build on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from graphopt.errors import BackendError

_library = torch.library.Library("graphopt", "FRAGMENT")

_RECORD = "_graphopt_record"
# Bytes of a generator's state: fake kernels must know them without a generator.
_RANDOM_STATE_BYTES = {"cpu": torch.get_rng_state().numel(), "cuda": 16}


def _contiguous(gradient: Tensor, index: int, *args: object) -> Tensor:
    return gradient.contiguous()


@dataclass(frozen=True)
class Function:
    """What an operator computes.

    All callables take the operator's parameters; `eager` runs under autocast where it applies, and
    `fake` also takes the autocast dtype.

    Attributes:
        eager: returns the outputs, with the strides that `fake` promises.
        fake: returns uninitialised outputs of the right sizes, strides, dtypes and devices.
        is_random: whether the outputs depend on the random generator of the device.
        can_repeat: whether a random result can be repeated from the generator's state.
        arrange: lays out a gradient; takes it, the index of its tensor, and the parameters.
    """

    eager: Callable[..., tuple[Tensor, ...]]
    fake: Callable[..., tuple[Tensor, ...]]
    is_random: Callable[..., bool] = lambda *_: False
    can_repeat: Callable[..., bool] = lambda *_: True
    arrange: Callable[..., Tensor] = _contiguous


def define(name: str, parameters: str, outputs: int, function: Function) -> None:
    """Register ``graphopt::NAME`` and ``graphopt::NAME_backward`` with all their kernels.

    Args:
        name: the operator, with ``.OVERLOAD`` behind it where there are several.
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
        *call, wanted = args
        tape = _new_tape(function, call)
        if not any(wanted):
            return (*_eager(function, call), tape)
        record = _record(function, call, wanted)
        setattr(tape, _RECORD, record)
        return (*(output.detach() for output in record.outputs), tape)

    def forward_fake(*args: Any) -> tuple[Tensor, ...]:
        *call, _ = args
        random = function.is_random(*call[:-1])
        size = _RANDOM_STATE_BYTES[_device(call)] if random else 0
        return (*function.fake(*call), torch.empty(size, dtype=torch.uint8))

    def backward(grads: Sequence[Tensor | None], wanted: Sequence[bool], *args: Any) -> list[Tensor]:
        *call, tape = args
        record: _Record | None = tape.__dict__.pop(_RECORD, None)
        if record is None or not record.is_of(_tensors(call)):
            record = _repeat(function, call, wanted, tape)
        indices, found = record.differentiate(grads, wanted)
        return [function.arrange(g, i, *call) for i, g in zip(indices, found, strict=True)]

    def backward_fake(grads: object, wanted: Sequence[bool], *args: Any) -> list[Tensor]:
        *call, _ = args
        return [
            function.arrange(tensor.new_empty(tensor.shape), i, *call)
            for i, tensor in enumerate(_tensors(call))
            if wanted[i]
        ]

    def autograd(*args: Any) -> tuple[Tensor, ...]:
        leaves, spec = pytree.tree_flatten(args[:-1])
        if torch.is_grad_enabled() and any(t.requires_grad for t in _tensors(leaves)):
            return tuple(_Differentiable.apply(forward_op, backward_op, spec, *leaves))
        with torch._C._AutoDispatchBelowAutograd():
            return tuple(forward_op(*args))

    def autocast(*args: Any) -> tuple[Tensor, ...]:
        *call, dtype, wanted = args
        device = _device(call)
        with torch.autocast(device, enabled=False):
            return tuple(forward_op(*call, dtype or torch.get_autocast_dtype(device), wanted))

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
            n for n, leaf in zip(ctx.needed, leaves, strict=True) if isinstance(leaf, Tensor)
        ]
        with torch._C._AutoDispatchBelowAutograd():
            outputs = tuple(forward_op(*pytree.tree_unflatten(leaves, spec), ctx.wanted))
        ctx.mark_non_differentiable(outputs[-1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*_tensors(leaves), outputs[-1])
        ctx.backward_op, ctx.spec = backward_op, spec
        ctx.constants = [None if isinstance(leaf, Tensor) else (leaf,) for leaf in leaves]
        return outputs

    @staticmethod
    @torch.autograd.function.once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        *tensors, tape = ctx.saved_tensors
        saved = iter(tensors)
        leaves = [next(saved) if held is None else held[0] for held in ctx.constants]
        call = pytree.tree_unflatten(leaves, ctx.spec)
        found = iter(ctx.backward_op(list(grads[:-1]), ctx.wanted, *call, tape))
        return None, None, None, *(next(found) if needed else None for needed in ctx.needed)


# -- parts of the kernels; a `call` is the parameters and the autocast dtype -----------------------


@dataclass(frozen=True)
class _Record:
    """What autograd remembers of one call."""

    leaves: tuple[Tensor, ...]
    versions: tuple[int, ...]
    outputs: tuple[Tensor, ...]

    def is_of(self, tensors: Sequence[Tensor]) -> bool:
        """Whether the call was made with these tensors, and they hold what they held."""
        return all(
            leaf.is_set_to(tensor) and tensor._version == version
            for leaf, tensor, version in zip(self.leaves, tensors, self.versions, strict=True)
        )

    def differentiate(
        self, grads: Sequence[Tensor | None], wanted: Sequence[bool]
    ) -> tuple[list[int], list[Tensor]]:
        """Indices and gradients of the wanted leaves; the record cannot be used again."""
        indices = [i for i, want in enumerate(wanted) if want]
        given = {
            output: grad
            for output, grad in zip(self.outputs, grads, strict=True)
            if grad is not None and output.requires_grad
        }
        with _recording():
            found = torch.autograd.grad(
                list(given),
                [self.leaves[i] for i in indices],
                list(given.values()),
                materialize_grads=True,
            )
        return indices, list(found)


def _tensors(call: Sequence[Any]) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tuple(call)) if isinstance(leaf, Tensor)]


def _device(call: Sequence[Any]) -> str:
    return _tensors(call)[0].device.type


def _eager(function: Function, call: Sequence[Any]) -> tuple[Tensor, ...]:
    *parameters, dtype = call
    if dtype is None:
        return function.eager(*parameters)
    with torch.autocast(_device(call), dtype):
        return function.eager(*parameters)


def _record(function: Function, call: Sequence[Any], wanted: Sequence[bool]) -> _Record:
    tensors = _tensors(call)
    leaves = tuple(t.detach().requires_grad_(w) for t, w in zip(tensors, wanted, strict=True))
    replacement = iter(leaves)
    with _recording():
        outputs = _eager(
            function, pytree.tree_map_only(Tensor, lambda _: next(replacement), list(call))
        )
    return _Record(leaves, tuple(tensor._version for tensor in tensors), outputs)


def _repeat(
    function: Function, call: Sequence[Any], wanted: Sequence[bool], tape: Tensor
) -> _Record:
    """Record the call anew, with the randomness that it had when `tape` was made."""
    if not function.is_random(*call[:-1]):
        return _record(function, call, wanted)
    if not function.can_repeat(*call[:-1]):
        raise BackendError(
            "The random numbers of this operator cannot be repeated and its record is gone.",
            hint="run backward once per forward, without hooks that copy saved tensors",
        )
    device = _tensors(call)[0].device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        if device.type == "cuda":
            torch.cuda.set_rng_state(tape, device)
        else:
            torch.set_rng_state(tape)
        return _record(function, call, wanted)


def _new_tape(function: Function, call: Sequence[Any]) -> Tensor:
    if not function.is_random(*call[:-1]):
        return torch.empty(0, dtype=torch.uint8)
    device = _tensors(call)[0].device
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


@contextmanager
def _recording() -> Iterator[None]:
    """Autograd as it is outside of operators; inside one, the dispatcher has left it behind."""
    key, keyset = torch._C.DispatchKey, torch._C.DispatchKeySet
    autograd = (
        keyset(key.AutogradFunctionality)
        | keyset(key.AutogradOther)
        | keyset(key.AutogradNestedTensor)
    )
    include = torch._C._dispatch_tls_local_include_set()
    exclude = torch._C._dispatch_tls_local_exclude_set() - autograd
    with torch._C._ForceDispatchKeyGuard(include, exclude), torch.enable_grad():
        yield
