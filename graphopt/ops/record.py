"""Running an eager function inside an operator's kernel so that it can be differentiated later.

An `Invocation` is one call of a `Function`: its parameters and the autocast dtype that it runs
under. A `Record` is such a call together with what autograd remembers of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from graphopt.errors import BackendError

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


@dataclass(frozen=True)
class Invocation:
    """One call of a function; the first tensor among its parameters decides the device."""

    function: Function
    parameters: Sequence[Any]
    autocast: torch.dtype | None

    @cached_property
    def tensors(self) -> list[Tensor]:
        """All tensors among the parameters, in order."""
        return tensors_of(self.parameters)

    @property
    def device(self) -> torch.device:
        """The device it runs on."""
        return self.tensors[0].device

    def run(self) -> tuple[Tensor, ...]:
        """The outputs."""
        if self.autocast is None:
            return self.function.eager(*self.parameters)
        with torch.autocast(self.device.type, self.autocast):
            return self.function.eager(*self.parameters)

    def fake(self) -> tuple[Tensor, ...]:
        """Uninitialised outputs."""
        return self.function.fake(*self.parameters, self.autocast)

    def arrange(self, gradient: Tensor, index: int) -> Tensor:
        """A gradient of the tensor with this index, in its promised layout."""
        return self.function.arrange(gradient, index, *self.parameters)

    @property
    def is_random(self) -> bool:
        """Whether the outputs depend on the random generator; raises on unknown generators."""
        if not self.function.is_random(*self.parameters):
            return False
        if self.device.type not in _RANDOM_STATE_BYTES:
            raise BackendError(
                f"Dropout inside an operator is not supported on {self.device.type!r} devices.",
                hint="use a CPU or CUDA device, or set dropout to 0",
            )
        return True

    def random_state(self) -> Tensor:
        """The state of the random generator as a CPU tensor; empty where it does not matter."""
        if not self.is_random:
            return torch.empty(0, dtype=torch.uint8)
        device = self.device
        return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()

    def fake_random_state(self) -> Tensor:
        """An uninitialised `random_state`."""
        size = _RANDOM_STATE_BYTES[self.device.type] if self.is_random else 0
        return torch.empty(size, dtype=torch.uint8)

    def record(self, wanted: Sequence[bool]) -> Record:
        """Run, with autograd recording for the tensors whose gradient is wanted."""
        tensors = self.tensors
        leaves = [t.detach() for t in tensors]
        for leaf, want in zip(leaves, wanted, strict=True):
            if want:
                leaf.requires_grad_()
        call = Invocation(self.function, with_tensors(self.parameters, leaves), self.autocast)
        with _autograd():
            outputs = call.run()
        return Record(leaves, [t._version for t in tensors], outputs)

    def repeat(self, wanted: Sequence[bool], random_state: Tensor) -> Record:
        """Record as if the generator were in this state; the generator itself is left as it is."""
        if not self.is_random:
            return self.record(wanted)
        if not self.function.can_repeat(*self.parameters):
            raise BackendError(
                "The random numbers of this operator cannot be repeated and its record is gone.",
                hint="run backward once per forward, without hooks that copy saved tensors",
            )
        device = self.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            if device.type == "cuda":
                torch.cuda.set_rng_state(random_state, device)
            else:
                torch.set_rng_state(random_state)
            return self.record(wanted)


@dataclass(frozen=True)
class Record:
    """What autograd remembers of one call."""

    leaves: Sequence[Tensor]
    versions: Sequence[int]
    outputs: Sequence[Tensor]

    def is_of(self, tensors: Sequence[Tensor], wanted: Sequence[bool]) -> bool:
        """Whether it has the wanted gradients of these tensors, unchanged since then."""
        recorded = zip(self.leaves, tensors, self.versions, wanted, strict=True)
        for leaf, tensor, version, want in recorded:
            if leaf.dtype != tensor.dtype or tensor._version != version:
                return False
            if not leaf.is_set_to(tensor) or (want and not leaf.requires_grad):
                return False
        return True

    def differentiate(
        self, grads: Sequence[Tensor | None], wanted: Sequence[bool]
    ) -> dict[int, Tensor]:
        """Gradients of the wanted leaves by index; the record cannot be used again."""
        indices = [i for i, want in enumerate(wanted) if want]
        outputs, given = [], []
        for output, grad in zip(self.outputs, grads, strict=True):
            if grad is not None and output.requires_grad:
                outputs.append(output)
                given.append(grad)
        leaves = [self.leaves[i] for i in indices]
        with _autograd():
            found = torch.autograd.grad(outputs, leaves, given, materialize_grads=True)
        return dict(zip(indices, found, strict=True))


_LISTS = (list, tuple)  # at each call: a union of types takes longer


def tensors_of(arguments: Sequence[Any]) -> list[Tensor]:
    """All tensors among arguments that may be lists, in order."""
    found: list[Tensor] = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            found.append(argument)
        elif isinstance(argument, _LISTS):
            found += [item for item in argument if isinstance(item, Tensor)]
    return found


def with_tensors(arguments: Sequence[Any], tensors: Iterable[Any]) -> list[Any]:
    """The arguments with others in place of their tensors, in the order of `tensors_of`."""
    others = iter(tensors)

    def other(argument: Any) -> Any:
        return next(others) if isinstance(argument, Tensor) else argument

    return [
        [other(item) for item in argument]
        if isinstance(argument, list | tuple)
        else other(argument)
        for argument in arguments
    ]


_KEYS = (
    torch._C.DispatchKeySet(torch._C.DispatchKey.AutogradFunctionality)
    | torch._C.DispatchKeySet(torch._C.DispatchKey.AutogradOther)
    | torch._C.DispatchKeySet(torch._C.DispatchKey.AutogradNestedTensor)
)


class _autograd:
    """Autograd as it works outside of operators; inside one, the dispatcher is already past it."""

    def __enter__(self) -> None:
        include = torch._C._dispatch_tls_local_include_set()
        exclude = torch._C._dispatch_tls_local_exclude_set() - _KEYS
        self._keys = torch._C._ForceDispatchKeyGuard(include, exclude)
        self._keys.__enter__()  # type: ignore[no-untyped-call]
        self._enabled = torch.is_grad_enabled()
        torch._C._set_grad_enabled(True)

    def __exit__(self, *error: object) -> None:
        torch._C._set_grad_enabled(self._enabled)
        self._keys.__exit__(*error)
