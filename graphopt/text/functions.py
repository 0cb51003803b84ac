"""Names of what forward graphs call: functions of torch and Python, and methods of tensors."""

from __future__ import annotations

import builtins
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.node import _get_qualified_name

_METHODS = "Tensor."
_ROOTS = {"torch": torch, "operator": operator, "builtins": builtins}


@dataclass(frozen=True)
class Method:
    """``Tensor.view``: what a ``call_method`` node calls."""

    name: str

    def __call__(self, value: Any, *args: Any, **kwargs: Any) -> Any:
        """Call it on its first argument."""
        return getattr(value, self.name)(*args, **kwargs)


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
