"""Names of what forward graphs call: functions of torch and Python, and methods of tensors."""

from __future__ import annotations

import builtins
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import fx
from torch.fx.node import _get_qualified_name

from graphopt.ops.numbers import NUMBER_FUNCTIONS
from graphopt.text.operators import names_no_mathematics

_METHODS = "Tensor."
_ROOTS = {"torch": torch, "operator": operator, "builtins": builtins}


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# What a text may call of them; it comes from anywhere, and most of Python is no mathematics.
_BUILTINS = _words("abs bool divmod float getattr int len max min pow round slice sum")
_NO_ARITHMETIC = frozenset({"attrgetter", "call", "itemgetter", "methodcaller"})
_FUNCTIONS: Any = vars(torch._C)["_VariableFunctions"]
_MODES = frozenset({
    "torch._C._log_api_usage_once",
    "torch._C._set_grad_enabled",
    "torch.amp.autocast_mode._enter_autocast",
    "torch.amp.autocast_mode._exit_autocast",
})  # fmt: skip
_HOMES = _words(
    "torch torch.nn.functional torch.functional torch.special torch.fft torch.linalg "
    "torch._C._nn torch._C._special torch._C._fft torch._C._linalg"
)
_NO_METHODS = re.compile(
    r"_.*|.*(?:storage|hook|memory|sparse|numpy|list|pickle|ptr|grad).*|apply_|map2?_|to_dense|cuda|"
    r"cpu|xpu|ipu|mtia|hpu|module_load|register.*|reinforce|new|type|stride_repr|dim_order|eig|solve"
)
_ATTRIBUTES = _words(
    "shape ndim dtype device layout T mT H mH real imag itemsize nbytes requires_grad is_cuda "
    "is_leaf start stop step"
)


@dataclass(frozen=True)
class Method:
    """``Tensor.view``: what a ``call_method`` node calls."""

    name: str

    def __call__(self, value: Any, *args: Any, **kwargs: Any) -> Any:
        """Call it on its first argument."""
        return getattr(value, self.name)(*args, **kwargs)


def may_call(name: str, args: Sequence[Any]) -> bool:
    """Whether a text may call this function or method, with these arguments."""
    home, _, last = name.rpartition(".")
    match home:
        case "Tensor":
            return not _NO_METHODS.fullmatch(last) and not names_no_mathematics(last)
        case "builtins":
            return last in _BUILTINS and (last != "getattr" or _reads_attribute(args))
        case "operator":
            return last not in _NO_ARITHMETIC and not last.startswith("_")
    if name in _MODES or name in NUMBER_FUNCTIONS:
        return True
    if home not in _HOMES or names_no_mathematics(last):
        return False
    found = function_of(name)
    if isinstance(found, BuiltinFunctionType):
        return home != "torch" or hasattr(_FUNCTIONS, last)
    return (
        isinstance(found, FunctionType)
        and found.__module__ in _HOMES - {"torch"}
        and not last.startswith("_")
    )


def _reads_attribute(args: Sequence[Any]) -> bool:
    return len(args) == 2 and isinstance(args[1], str) and args[1] in _ATTRIBUTES


def function_name(node: fx.Node) -> str | None:
    """The name of the function or method that a node calls; ``None`` where none leads back."""
    if node.op == "call_method":
        return f"{_METHODS}{node.target}"
    target = node.target
    assert callable(target)
    if target is getattr:
        return "builtins.getattr"
    try:
        name = _get_qualified_name(target).replace("_operator.", "operator.")
    except RuntimeError:
        return None
    return name if function_of(name) is target else None


def function_of(name: str) -> Callable[..., Any] | None:
    """What a name calls; the inverse of `function_name`."""
    if name.startswith(_METHODS):
        return Method(name.removeprefix(_METHODS))
    root, *path = name.split(".")
    found: Any = _ROOTS.get(root)
    for part in path:
        found = getattr(found, part, None)
    return found if path and callable(found) else None
