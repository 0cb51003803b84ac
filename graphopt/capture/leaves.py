"""Values that forward makes leaves of, and tensors that a function of autograd gets twice.

``h.requires_grad = True`` on a value that needs no gradient makes a leaf of it, whose gradient is
gone with the call: libraries do so for checkpointing, which looks at the first input. In a graph it
changes nothing. Dynamo refuses it, and functions of `torch.autograd.Function` that get one tensor
twice: the second one is a view of it here, so that each has a gradient of its own, as in eager.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch._dynamo.variables import builtin
from torch._dynamo.variables.base import VariableTracker
from torch._dynamo.variables.constant import ConstantVariable
from torch._dynamo.variables.higher_order_ops import AutogradFunctionApplyVariable

# Of torch 2.13, and of earlier ones.
_OWNER = getattr(builtin, "SetAttrBuiltinVariable", builtin.BuiltinVariable)
_METHOD = "_call_setattr" if hasattr(_OWNER, "_call_setattr") else "call_setattr"


@contextmanager
def leaves_of_forward() -> Iterator[None]:
    """While Dynamo captures; everything is put back on leaving."""
    with (
        mock.patch.object(_OWNER, _METHOD, _set(getattr(_OWNER, _METHOD))),
        mock.patch.object(
            AutogradFunctionApplyVariable,
            "call_function",
            _apart(AutogradFunctionApplyVariable.call_function),
        ),
    ):
        yield


def _set(original: Callable[..., Any]) -> Callable[..., Any]:
    def call_setattr(self: Any, tx: Any, obj: Any, name_var: Any, val: Any) -> Any:
        asked = obj.is_tensor() and name_var.is_python_constant()
        if asked and name_var.as_python_constant() == "requires_grad":
            wanted = val.as_python_constant() if val.is_python_constant() else None
            value = obj.as_proxy().node.meta["example_value"]
            if wanted is True and obj.source is None and value.grad_fn is None:
                return ConstantVariable.create(None)
        return original(self, tx, obj, name_var, val)

    return call_setattr


def _apart(original: Callable[..., Any]) -> Callable[..., Any]:
    def call_function(self: Any, tx: Any, args: Any, kwargs: Any) -> Any:
        seen: list[Any] = []
        apart: list[VariableTracker] = []
        for arg in args:
            found = arg.realize()
            if found.is_tensor():
                value = found.as_proxy().node.meta["example_value"]
                if any(value is other for other in seen):
                    found = found.call_method(tx, "view_as", [found], {})
                else:
                    seen.append(value)
            apart.append(found)
        return original(self, tx, apart, kwargs)

    return call_function
