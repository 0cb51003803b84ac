"""Run steps of the user's own model on the user's own batch and leave no trace.

Both the comparison with eager and the choice between backends need real steps. A trial restores the
random streams, the buffers, the inputs and the plain attributes of the modules afterwards, and
never touches a parameter's ``.grad``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graphopt.passbase import Numerics

Call = Callable[..., object]


@dataclass(frozen=True)
class Observed:
    """What one step computed: by name, every output, gradient and buffer."""

    values: Mapping[str, Tensor | None]


class Trial:
    """One call of a model, repeatable from the same state.

    Args:
        model: the module whose ``forward`` is tried.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call.
        around: what each run takes place in, beside the restoring of the model.
    """

    def __init__(
        self,
        model: nn.Module,
        args: Sequence[object],
        kwargs: Mapping[str, object],
        around: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> None:
        self.model = model
        self.args = args
        self.kwargs = kwargs
        named = dict(model.named_parameters())
        inputs = {f"input {n}": t for n, t in tensors_of(named_arguments(model, args, kwargs))}
        self.sources = {n: t for n, t in (named | inputs).items() if t.requires_grad}
        self._changeable = [*model.buffers(), *inputs.values()]
        self._around = around
        devices = {t.device for t in (*named.values(), *inputs.values())}
        self.devices = [d for d in devices if d.type == "cuda"]

    def observe(self, call: Call) -> Observed:
        """Run forward and backward once, with a random cotangent, and read everything."""
        with self.untouched():
            outputs = dict(tensors_of(call(self.model, *self.args, **self.kwargs)))
            gradients = self._backward(outputs)
            buffers = {f"buffer {n}": b.clone() for n, b in self.model.named_buffers()}
            results = {f"output {n}": t.detach() for n, t in outputs.items()}
            return Observed({**results, **gradients, **buffers})

    def step(self, call: Call) -> None:
        """Run forward and backward once, for its time only; call inside `untouched`."""
        self._backward(dict(tensors_of(call(self.model, *self.args, **self.kwargs))))

    def _backward(self, outputs: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
        differentiable = [t for t in outputs.values() if t.requires_grad]
        if not differentiable or not self.sources or not torch.is_grad_enabled():
            return {}
        generator = torch.Generator().manual_seed(0)
        cotangents = [cotangent(t, generator) for t in differentiable]
        gradients = torch.autograd.grad(
            differentiable, list(self.sources.values()), cotangents, allow_unused=True
        )
        names = (f"gradient of {n}" for n in self.sources)
        return dict(zip(names, gradients, strict=True))

    def same_random_numbers(self) -> AbstractContextManager[None]:
        """Within, random numbers are those of the call that is tried; outside nobody notices."""
        return torch.random.fork_rng(devices=self.devices)

    def _hooked(self) -> list[Any]:
        """Tensors with gradient hooks of the user's, which must not see a trial's gradients."""
        return [t for t in self.sources.values() if t._backward_hooks]

    @contextlib.contextmanager
    def untouched(self) -> Iterator[None]:
        """Restore random streams, buffers, inputs and plain attributes on the way out."""
        before = [(t, t.detach().clone()) for t in self._changeable]
        attributes = [(m, m.__dict__.copy()) for m in self.model.modules()]
        hooks = [(t._backward_hooks, dict(t._backward_hooks)) for t in self._hooked()]
        for registered, _ in hooks:
            registered.clear()
        with self._around(), self.same_random_numbers():
            try:
                yield
            finally:
                with torch.no_grad():
                    for tensor, value in before:
                        if not same(tensor, value):
                            tensor.copy_(value)
                for registered, functions in hooks:
                    registered.update(functions)
                for module, saved in attributes:
                    now = module.__dict__
                    if now.keys() != saved.keys() or any(now[k] is not saved[k] for k in saved):
                        module.__dict__.clear()
                        module.__dict__.update(saved)


def cotangent(output: Tensor, generator: torch.Generator) -> Tensor:
    """A random cotangent of an output; its mean is not 0, as sums are common losses."""
    return torch.randn(output.shape, generator=generator, dtype=torch.float32).to(output) + 1


def named_arguments(
    model: nn.Module, args: Sequence[object], kwargs: Mapping[str, object]
) -> dict[str, object]:
    """The call's arguments by the names that ``forward`` gives them, without defaults."""
    try:
        return dict(inspect.signature(model.forward).bind(*args, **kwargs).arguments)
    except (TypeError, ValueError):
        return {**{str(i): a for i, a in enumerate(args)}, **kwargs}


def tensors_of(value: object, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """All tensors in nested containers, dataclasses and plain objects, with their paths."""
    if isinstance(value, Tensor):
        yield path or "0", value
        return
    items: Iterator[tuple[object, Any]]
    if isinstance(value, Mapping):
        items = iter(value.items())
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = ((f.name, getattr(value, f.name)) for f in dataclasses.fields(value))
    else:
        return
    for key, item in items:
        yield from tensors_of(item, f"{path}.{key}" if path else str(key))


@dataclass(frozen=True)
class Difference:
    """How far one value of two observations is off.

    Attributes:
        name: of the value.
        error: largest difference relative to the largest magnitude of the reference.
        absolute: largest difference.
    """

    name: str
    error: float
    absolute: float = 0.0

    @property
    def equal(self) -> bool:
        """Whether everything was bit-equal."""
        return self.error == 0.0


def compare(reference: Observed, actual: Observed) -> Difference:
    """The value that differs most, relative to the largest magnitude of its reference.

    A value that one side lacks, or a NaN that only one side has, differs infinitely.
    """
    return max(differences(reference, actual), key=lambda d: d.error, default=Difference("", 0.0))


def differences(reference: Observed, actual: Observed) -> list[Difference]:
    """All values that are not bit-equal."""
    found = []
    for name in sorted(reference.values.keys() | actual.values.keys()):
        error, absolute = _error(reference.values.get(name), actual.values.get(name))
        if error > 0:
            found.append(Difference(name, error, absolute))
    return found


def tolerance(observed: Observed, numerics: Numerics) -> float:
    """Largest allowed relative error between two runs that should agree at `numerics`.

    Eager itself is not always reproducible to the last bit (atomics on GPUs), so even an exact
    rewrite is refused only beyond what rounding in the coarsest dtype of the step explains.
    """
    floats = [v.dtype for v in observed.values.values() if v is not None and v.is_floating_point()]
    eps = max((torch.finfo(d).eps for d in floats), default=0.0)
    return max(numerics.bound, 1e3 * eps if eps < 1e-3 else 8 * eps)


def tolerance_of_pass(observed: Observed, numerics: Numerics) -> float:
    """Largest allowed relative error between a graph and what a pass made of it.

    On a CPU the same operators give the same bits, so a pass gets exactly the bound of its class.
    On a GPU eager itself differs from run to run (atomics).
    """
    on_gpu = any(value is not None and value.is_cuda for value in observed.values.values())
    return tolerance(observed, numerics) if on_gpu else numerics.bound


def _error(reference: Tensor | None, actual: Tensor | None) -> tuple[float, float]:
    """Relative and absolute difference."""
    infinite = float("inf"), float("inf")
    if reference is None or actual is None:
        return (0.0, 0.0) if reference is actual else infinite
    if reference.shape != actual.shape or reference.dtype != actual.dtype:
        return infinite
    if reference.layout is not actual.layout:
        return infinite
    if same(reference, actual):
        return 0.0, 0.0
    if reference.layout is not torch.strided:
        reference, actual = reference.to_dense(), actual.to_dense()
    if not (reference.is_floating_point() or reference.is_complex()):
        return infinite
    wide = torch.complex128 if reference.is_complex() else torch.float64
    a, b = reference.to(wide), actual.to(wide)
    alike = (a == b) | (a.isnan() & b.isnan())
    difference = torch.where(alike, 0.0, (a - b).abs()).max().item()
    scale = torch.where(a.isfinite(), a.abs(), 0.0).max().item()
    error = difference / scale if scale > 0 else difference
    # NaN in one and not the other compares unequal with everything.
    return (error, difference) if error == error else infinite


def same(a: Tensor, b: Tensor) -> bool:
    """Bit-equal, with NaN equal to NaN."""
    if a.layout is not torch.strided or b.layout is not torch.strided:
        return a.layout is b.layout and same(a.to_dense(), b.to_dense())
    return bool(torch.equal(a, b) or (a.is_floating_point() and _nan_equal(a, b)))


def _nan_equal(a: Tensor, b: Tensor) -> bool:
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


def describe_call(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """One line on what kind of call this is: inputs and mode."""
    inputs = ", ".join(
        f"{name}: {str(t.dtype).removeprefix('torch.')}{list(t.shape)}"
        for name, t in tensors_of(named_arguments(model, args, kwargs))
    )
    mode = ["train" if model.training else "eval"]
    mode += [] if torch.is_grad_enabled() else ["no_grad"]
    mode += ["autocast"] if torch.is_autocast_enabled("cpu") else []
    return f"{inputs} ({', '.join(mode)})"
