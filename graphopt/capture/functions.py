"""What a captured forward calls, as text that is equal on ranks which compute the same.

Sizes may differ between ranks, and so may numbers that are made of them. So numbers count only
where they are no sizes: floating-point arguments of functions other than arithmetic, exponents,
flags and names. Ranks may run branches in an order of their own, so only which functions there are
is compared, and how often.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, fx

# Whose numbers may be sizes, or made of them: a mean divides by one.
_ARITHMETIC = (
    "add sub mul div truediv floordiv mod iadd isub imul itruediv divide multiply subtract "
    "true_divide floor_divide clamp clip"
)
_MAKING = "full full_like new_full arange linspace interpolate getitem setitem fill_ masked_fill"
_OF_SIZES = frozenset(f"{_ARITHMETIC} {_MAKING}".split())
_POWERS = frozenset({"pow", "pow_", "ipow", "rpow"})


def functions_of(module: fx.GraphModule) -> str:
    """One line per function that makes tensors, sorted."""
    return "\n".join(sorted(_lines(module)))


def _lines(module: fx.GraphModule) -> Iterator[str]:
    for node in module.graph.nodes:
        if node.op == "get_attr":
            inner = getattr(module, str(node.target), None)
            if isinstance(inner, fx.GraphModule):
                yield from _lines(inner)
        elif node.op.startswith("call_") and _makes_tensors(node):
            name = _name(node)
            yield " ".join([name, *_constants(node, name)])


def _name(node: fx.Node) -> str:
    found = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return found or type(node.target).__name__


def _makes_tensors(node: fx.Node) -> bool:
    value = node.meta.get("example_value", node.meta.get("val"))
    several = value if isinstance(value, tuple | list) else (value,)
    return any(isinstance(one, Tensor) for one in several)


def _constants(node: fx.Node, name: str) -> Iterator[str]:
    if name in _OF_SIZES:
        return
    kinds: tuple[type, ...] = (float, bool, str) + ((int,) if name in _POWERS else ())
    given: list[tuple[str, Any]] = [("", value) for value in node.args]
    for key, value in (*given, *sorted(node.kwargs.items())):
        if isinstance(value, kinds):
            yield f"{key}={value!r}" if key else repr(value)
