"""Everything a step leaves behind, as values that can be compared."""

from __future__ import annotations

import collections
import hashlib
import random
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from graphopt.model.comparison import same
from graphopt.testing.fuzz.state import Meter


def state_of(model: nn.Module) -> dict[str, object]:
    """Parameters, gradients, buffers and whatever else the modules hold, by name."""
    found: dict[str, object] = {}
    for name, parameter in model.named_parameters():
        found[f"parameter {name}"] = _kept(parameter)
        found[f"gradient of {name}"] = _kept(parameter.grad)
    for name, buffer in model.named_buffers():
        found[f"buffer {name}"] = _kept(buffer)
    for name, module in model.named_modules():
        found[f"mode of {name}"] = module.training
        for key, value in module.__dict__.items():
            if not key.startswith("_") and not isinstance(value, types.MethodType):
                found |= leaves(f"{name}.{key}", value)
    return found


def surroundings() -> dict[str, object]:
    """Random streams and modes: what belongs to the process."""
    states = {
        "torch": torch.get_rng_state().numpy().tobytes(),
        "python": repr(random.getstate()).encode(),
        "numpy": repr(np.random.get_state()).encode(),
    }
    found: dict[str, object] = {
        f"random stream of {n}": hashlib.sha1(s).hexdigest() for n, s in states.items()
    }
    return found | {
        "function modes": torch._C._len_torch_function_stack(),
        "dispatch modes": torch._C._len_torch_dispatch_stack(),
        "grad mode": torch.is_grad_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "anomaly detection": torch.is_anomaly_enabled(),
        "default dtype": torch.get_default_dtype(),
        "calls of modules": nn.Module.__call__,
    }


def leaves(name: str, value: object) -> dict[str, object]:
    """The tensors and plain values within a value, by path."""
    return dict(_leaves(name, value))


def _leaves(name: str, value: Any) -> Iterator[tuple[str, object]]:
    if isinstance(value, dict):
        yield f"keys of {name}", list(value)
        for key, item in value.items():
            yield from _leaves(f"{name}[{key!r}]", item)
    elif isinstance(value, list | tuple | collections.deque):
        yield f"length of {name}", len(value)
        for index, item in enumerate(value):
            yield from _leaves(f"{name}[{index}]", item)
    elif isinstance(value, Meter):
        yield from _leaves(name, vars(value))
    elif isinstance(value, torch.Generator):
        yield name, value.get_state()
    elif isinstance(value, Tensor):
        yield name, _kept(value)
    elif value is None or isinstance(value, bool | int | float | str):
        yield name, (type(value).__name__, value)


def _kept(value: Tensor | None) -> object:
    """A copy, and what autograd knows about it."""
    if value is None or isinstance(value, UninitializedParameter | UninitializedBuffer):
        return type(value).__name__
    with torch.inference_mode(False), torch.no_grad():
        return value.detach().clone(), value.requires_grad, value.is_leaf, value.is_inference()


def difference(expected: dict[str, object], found: dict[str, object], rounding: float = 0.0) -> str:
    """The first difference in words, and nothing if there is none.

    Args:
        expected: of eager.
        found: of graphopt.
        rounding: how far gradients of parameters may be off, of their largest magnitude.
    """
    for side, names in (
        ("PyTorch", expected.keys() - found.keys()),
        ("graphopt", found.keys() - expected.keys()),
    ):
        if names:
            return f"only {side} has {', '.join(sorted(names)[:3])}"
    for name, want in expected.items():
        allowed = rounding if name.startswith("gradient of ") else 0.0
        if text := _differs(want, found[name], allowed):
            return f"{name}: {text}"
    return ""


def _differs(want: Any, have: Any, allowed: float) -> str:
    if not (isinstance(want, tuple) and want and isinstance(want[0], Tensor)):
        if isinstance(want, Tensor) and isinstance(have, Tensor):
            return "" if same(want, have) else "another state"
        return "" if type(want) is type(have) and want == have else f"{have} instead of {want}"
    if not (isinstance(have, tuple) and isinstance(have[0], Tensor)):
        return f"{have} instead of a tensor"
    (a, *flags), (b, *others) = want, have
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return f"{b.dtype}{list(b.shape)} instead of {a.dtype}{list(a.shape)}"
    if flags != others:
        names = ("requires_grad", "is_leaf", "is_inference")
        wrong = [n for n, f, o in zip(names, flags, others, strict=True) if f != o]
        return f"{', '.join(wrong)} is {[o for f, o in zip(flags, others, strict=True) if f != o]}"
    if same(a, b):
        return ""
    off, largest = ((t.double()).abs().max().item() for t in (a.double() - b.double(), a))
    return "" if off <= allowed * largest else f"off by {off:.3g} of {largest:.3g}"
