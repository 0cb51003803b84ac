"""What kept code may say: operators, words of torch and small constants, as data and back.

Everything is looked up among what torch has; nothing that is read is executed.
"""

from __future__ import annotations

import math
import operator
from functools import cache
from typing import Any

import torch
from torch import Tensor

from graphopt.text.elements import elements_of, inlined, restored
from graphopt.text.names import operator_of
from graphopt.text.operators import is_allowed, misfit, names_no_mathematics
from graphopt.text.syntax import TensorType


class Untold(Exception):
    """Code holds something that is no data, for this reason."""


class Unreadable(Exception):
    """Data that is no code."""


class Misfit(Exception):
    """Data of an engine that was made in other surroundings."""


PLAIN = (type(None), bool, int, float, str)
_WORDS = (torch.dtype, torch.layout, torch.memory_format)
_MOST = 1 << 14  # elements of a constant: a mask, or positions
_SMALLEST, _LARGEST = -(2**63), 2**63 - 1
_ANY = torch.empty(0)  # stands for a value where arguments are compared with a schema


# -- writing ---------------------------------------------------------------------------------------


def word_data(value: object) -> dict[str, str]:
    """A word of torch among the arguments of an operator.

    Raises:
        Untold: it is something else.
    """
    if isinstance(value, _WORDS):
        return {"torch": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    raise Untold(f"an operator has an argument of type {type(value).__name__}")


def constant_data(value: object) -> dict[str, Any]:
    """A tensor with its elements.

    Raises:
        Untold: it is something else, or large.
    """
    if not isinstance(value, Tensor) or inlined(value, _MOST) is None:
        raise Untold("it holds a constant that is large, or no plain tensor")
    return {
        "dtype": str(value.dtype).removeprefix("torch."),
        "shape": list(value.shape),
        "stride": list(value.stride()),
        "bytes": elements_of(value).hex(),
    }


# -- reading ---------------------------------------------------------------------------------------


@cache
def looked_up(what: object, which: object) -> object:
    """The word of torch that `word_data` has told.

    Raises:
        Unreadable: there is none.
    """
    if what == "device" and isinstance(which, str):
        return torch.device(which)
    found = getattr(torch, which, None) if what == "torch" and isinstance(which, str) else None
    if not isinstance(found, _WORDS):
        raise Unreadable(f"there is no {which!r:.60}")
    return found


def plain(value: Any) -> Any:
    """A number, a word or nothing, as it is.

    Raises:
        Unreadable: it is something else.
    """
    kind = type(value)
    if kind not in PLAIN or (kind is int and not _SMALLEST <= value <= _LARGEST):
        raise Unreadable("an argument that there is not")
    return value


def tensor_of(data: Any) -> Tensor:
    """The tensor that `constant_data` has told."""
    dtype = looked_up("torch", data["dtype"])
    if not isinstance(dtype, torch.dtype):
        raise Unreadable("a constant of no type")
    shape, stride = tuple(data["shape"]), tuple(data["stride"])
    if len(shape) != len(stride) or math.prod(shape) > _MOST:
        raise Unreadable("a constant that is none")
    kind = TensorType(dtype, shape, stride, torch.device("cpu"))
    return restored(kind, bytes.fromhex(data["bytes"]))


def callable_of(name: object) -> Any:
    """The operator of this name, or what picks one of several results.

    Raises:
        Unreadable: code may not call it.
    """
    target = operator_of(name) if isinstance(name, str) else None
    if target is operator.getitem:
        return target
    if not isinstance(target, torch._ops.OpOverload) or not _may_call(target):
        raise Unreadable(f"code may not call {name!r:.60}")
    return target


@cache
def _may_call(target: torch._ops.OpOverload) -> bool:
    """Whether a text may call an operator, or it is a form of such a one that writes in place."""
    if is_allowed(target):
        return True
    namespace, _, name = target._schema.name.partition("::")
    in_place = name.endswith("_") and not name.endswith("__")
    writes = name.startswith("_foreach_") or any(a.is_out for a in target._schema.arguments)
    plain = name.removeprefix("_foreach_").removesuffix("_")
    return namespace == "aten" and (writes or in_place) and not names_no_mathematics(plain)


def line_of(row: Any, calls: int) -> tuple[int, list[Any], dict[str, Any]]:
    """Which operator a line calls, and with what.

    Raises:
        Unreadable: it is no line.
    """
    index, arguments, *rest = row
    named = rest[0] if rest else {}
    if type(index) is not int or not 0 <= index < calls or not isinstance(arguments, list):
        raise Unreadable("a line calls nothing")
    return index, arguments, named


def check_call(target: Any, arguments: list[Any], named: dict[str, Any]) -> None:
    """See whether an operator takes these arguments.

    Raises:
        Unreadable: it does not.
    """
    if target is operator.getitem:
        value, place = arguments
        if named or type(place) is not int or not isinstance(value, dict):
            raise Unreadable("a line takes nothing of something")
        return
    given = {key: _example(value) for key, value in named.items()}
    if wrong := misfit(target, [_example(value) for value in arguments], given):
        raise Unreadable(f"{target}: {wrong}")


def _example(value: Any) -> Any:
    if type(value) is dict:
        ((what, which),) = value.items()
        return _ANY if what in ("v", "c") else looked_up(what, which)
    return [_example(item) for item in value] if type(value) is list else value
