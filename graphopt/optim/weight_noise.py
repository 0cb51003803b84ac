"""Normal noise for weights, and what its standard deviation may be."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Generator, Tensor

from graphopt.errors import ArgumentError

Deviation = float | Mapping[str, Tensor] | Callable[[str, Tensor], Tensor | float]
"""One number, tensors by parameter name, or a function of name and parameter."""


def check_deviation(std: Deviation, names: Iterable[str]) -> None:
    """Refuse deviations that are negative, not finite, or missing for one of `names`.

    The results of a function are not checked.

    Raises:
        ArgumentError: for such a deviation.
    """
    if isinstance(std, Mapping):
        for name in names:
            if name not in std:
                raise ArgumentError(
                    f"std names no deviation for parameter {name!r}",
                    where=name,
                    hint="name every trainable parameter; 0 leaves one unperturbed",
                )
        for name, value in std.items():
            _check_value(value, f"std[{name!r}]")
    elif not callable(std):
        _check_value(std, "std")


def draw_noise(name: str, parameter: Tensor, std: Deviation, generator: Generator | None) -> Tensor:
    """Noise shaped like `parameter`, on its device, in its dtype but at least float32.

    Args:
        name: qualified name of the parameter.
        parameter: any shape.
        std: standard deviation, see `Deviation`; tensors broadcast to the parameter.
        generator: on any device; ``None`` is the global one of the parameter's device.

    Raises:
        ArgumentError: the deviation does not broadcast to the parameter.
    """
    if isinstance(std, Mapping):
        value: Tensor | float = std[name]
    else:
        value = std(name, parameter) if callable(std) else std
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    device = parameter.device if generator is None else generator.device
    noise = torch.randn(parameter.shape, dtype=dtype, device=device, generator=generator)
    noise = noise.to(parameter.device)
    if isinstance(value, Tensor):
        if not _broadcasts(value.shape, parameter.shape):
            raise ArgumentError(
                f"the deviation of {name!r}, {tuple(value.shape)}, does not broadcast to "
                f"{tuple(parameter.shape)}",
                where=name,
                hint="give one value, or one per element of the parameter",
            )
        value = value.detach().to(parameter.device, dtype)
    return noise.mul_(value)


def _broadcasts(shape: torch.Size, target: torch.Size) -> bool:
    sizes = zip(reversed(shape), reversed(target), strict=False)
    return len(shape) <= len(target) and all(have in (1, want) for have, want in sizes)


def _check_value(value: Tensor | float, where: str) -> None:
    if isinstance(value, Tensor):
        usable = bool(((value >= 0) & value.isfinite()).all())
    else:
        usable = value >= 0 and math.isfinite(value)
    if not usable:
        raise ArgumentError(
            "a standard deviation is negative or not finite",
            where=where,
            hint="pass 0 or more, for example 0.01",
        )
