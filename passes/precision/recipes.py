"""How each emulated format makes its operands; another one is another row.

An emulated format has no arithmetic on this device: the operands of a product are rounded to it,
read back as float32, and multiplied there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch._ops import OpOverload

import graphopt.ops  # noqa: F401  (registers the operators)
from graphopt.errors import ArgumentError

_ops = torch.ops.graphopt

Arguments = tuple[object, ...]


@dataclass(frozen=True)
class Recipe:
    """The operators of a format, and what they are called with.

    Attributes:
        quantise: from a float32 tensor to values and scales.
        dequantise: from values and scales to float32.
        by_axis: whether scales run along the contracted axis, so that each axis of a tensor is
            rounded differently. Otherwise a tensor has one scale.
        arguments: of `quantise` behind the tensor, for a gradient or not, and an axis.
        reads_axis: whether `dequantise` has to be told the axis.
        scaled: dtype of the scales where some devices multiply such matrices themselves.
    """

    quantise: OpOverload
    dequantise: OpOverload
    by_axis: bool
    arguments: Callable[[bool, int | None], Arguments]
    reads_axis: bool = False
    scaled: torch.dtype | None = None

    def kind(self, is_gradient: bool, axis: int | None) -> Arguments:
        """What `quantise` is called with; operands of the same kind share one quantiser."""
        return self.arguments(is_gradient, axis if self.by_axis else None)


def _mxfp8(scaling: str) -> Recipe:
    return Recipe(
        _ops.mx_quantise.default,
        _ops.mx_dequantise.default,
        by_axis=True,
        arguments=lambda _, axis: (axis, scaling),
        reads_axis=True,
        scaled=torch.float8_e8m0fnu,
    )


def _float8(by_axis: bool, gradients: torch.dtype, power_of_two: bool) -> Recipe:
    def arguments(is_gradient: bool, axis: int | None) -> Arguments:
        return (gradients if is_gradient else torch.float8_e4m3fn, axis, power_of_two)

    return Recipe(
        _ops.float8_quantise.default,
        _ops.float8_dequantise.default,
        by_axis,
        arguments,
        scaled=torch.float32,
    )


@dataclass(frozen=True)
class _Family:
    """The recipes of a format by the value of the option that tells them apart."""

    option: str
    recipes: Mapping[str, Recipe]


_FAMILIES = {
    "flex16": _Family(
        "",
        {
            "": Recipe(
                _ops.flex16_quantise.default,
                _ops.flex16_dequantise.default,
                by_axis=False,
                arguments=lambda *_: (),
            )
        },
    ),
    "mxfp8": _Family("scaling", {rule: _mxfp8(rule) for rule in ("floor", "rceil")}),
    # Those of torchao: Float8LinearConfig's recipes "tensorwise" and "rowwise".
    "float8": _Family(
        "granularity",
        {
            "tensor": _float8(False, torch.float8_e5m2, power_of_two=False),
            "row": _float8(True, torch.float8_e4m3fn, power_of_two=True),
        },
    ),
}

_OWNERS = {family.option: name for name, family in _FAMILIES.items() if family.option}


def recipe_of(format: str, options: Mapping[str, str]) -> Recipe | None:
    """The recipe of a format; ``None`` for one that torch has operators in.

    Args:
        format: its name in the spec language.
        options: the options that tell recipes apart, by name.

    Raises:
        ArgumentError: an option is not at its default and says nothing about this format.
    """
    family = _FAMILIES.get(format)
    for name, value in options.items():
        owner = _OWNERS[name]
        if owner != format and value != next(iter(_FAMILIES[owner].recipes)):
            raise ArgumentError(
                f"precision: {name}={value} says nothing about format={format}",
                hint=f"leave it out, or choose format={owner}",
            )
    return family.recipes[options.get(family.option, "")] if family else None
