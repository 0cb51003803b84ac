"""Numbers in graphs: what a call reads off a tensor (`item`, a size that depends on data).

They are computed with in Python, by the few functions named here, which a graph may call beside
operators.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch

NUMBER_FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    f"{module.__name__.strip('_')}.{name}": getattr(module, name)
    for module, names in (
        (operator, "add sub mul truediv floordiv mod pow neg pos abs"),
        (operator, "eq ne lt le gt ge and_ or_ not_ lshift rshift"),
        (math, "trunc floor ceil sqrt"),
        (torch, "sym_int sym_float sym_max sym_min sym_not sym_ite sym_sum"),
        (torch, "_sym_sqrt _sym_exp _sym_log2 _sym_sin _sym_cos _sym_tan _sym_tanh"),
    )
    for name in names.split()
    if hasattr(module, name)
}
"""By qualified name."""

_NAMES = {function: name for name, function in NUMBER_FUNCTIONS.items()}


def number_function(target: object) -> str:
    """The name of a function in `NUMBER_FUNCTIONS`; ``""`` for anything else."""
    return _NAMES.get(target, "") if callable(target) else ""


def is_number(value: object) -> bool:
    """Whether a value of a graph is a number, symbolic or not, and no tensor."""
    return isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool | int | float)
