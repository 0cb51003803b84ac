"""What one method has decided: a frozen dataclass that goes to JSON and back by its type hints."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from reprlib import Repr
from typing import (
    Annotated,
    Any,
    ClassVar,
    Literal,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

from graphopt.errors import PlanError
from graphopt.plan.limits import OneOf, Within

T = TypeVar("T")

_SHOWN = Repr()  # of data of any depth and length
_SHOWN.maxstring = _SHOWN.maxother = 60
_BEYOND = 1 << 1023  # larger whole numbers are no floats; an infinity is one
_PLAIN = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class PlanPart:
    """Base of what passes leave in a plan for their runtime parts.

    Subclasses are frozen dataclasses whose fields are plain data: numbers, texts, enums, tuples,
    mappings with texts as keys, and dataclasses of those. What a field may hold beside its type is
    part of the type, too (`graphopt.plan.limits`), and what fields may hold together is checked
    when the dataclass is made, by a ``ValueError`` of ``__post_init__``.

    Class attributes:
        name: the name of the pass.
        version: grows when the meaning of the fields changes; the runtime part has to have it, too.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1


def to_data(value: object, where: str = "") -> Any:
    """The value as JSON has it: dictionaries, lists, numbers and texts.

    Args:
        value: plain data, see `PlanPart`.
        where: path of the value, for the error.

    Raises:
        PlanError: something in it is no plain data, or NaN.
    """
    if isinstance(value, PlanPart):
        where = where or value.name
    if isinstance(value, Enum):
        return value.value
    _check_number(value, where)
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, (tuple, list)):
        return [to_data(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {str(key): to_data(item, f"{where}[{key!r}]") for key, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: to_data(getattr(value, field.name), f"{where}.{field.name}".lstrip("."))
            for field in dataclasses.fields(value)
        }
    raise PlanError(
        f"{where or 'it'} is a {type(value).__name__}, which JSON does not have",
        hint="keep numbers, texts, tuples and dataclasses of them in a plan part",
    )


def from_data(kind: type[T], data: object) -> T:
    """The inverse of `to_data` for a value of this type.

    Raises:
        PlanError: the data does not fit the type.
    """
    where = kind.name if isinstance(kind, type) and issubclass(kind, PlanPart) else ""
    return cast("T", _read(kind, data, where))


def _check_number(value: object, where: str) -> None:
    """Plans are compared between ranks, and NaN equals nothing.

    Raises:
        PlanError: it is NaN.
    """
    if isinstance(value, float) and value != value:
        raise PlanError(
            f"{where or 'it'} is NaN, which no plan may hold",
            hint="decide on a number, or on None for none",
        )


def _read(kind: Any, data: Any, where: str) -> Any:
    _check_number(data, where)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        value = _read(arguments[0], data, where)
        for limit in arguments[1:]:
            if isinstance(limit, (Within, OneOf)) and not limit.allows(value):
                raise PlanError(
                    f"{where or 'it'} should be {limit} and is {_SHOWN.repr(value)}",
                    hint="make the plan anew",
                )
        return value
    if dataclasses.is_dataclass(kind) and isinstance(kind, type) and isinstance(data, dict):
        return _dataclass(kind, data, where)
    if origin in (Union, types.UnionType):
        return _union(arguments, data, where)
    if origin is Literal:
        # `1 == True == 1.0`, and only one of them was written.
        for option in arguments:
            if type(option) is type(data) and option == data:
                return data
    if origin is tuple and isinstance(data, (list, tuple)):
        many = len(arguments) == 2 and arguments[1] is Ellipsis
        kinds = [arguments[0]] * len(data) if many else arguments
        if len(kinds) == len(data):
            pairs = enumerate(zip(kinds, data, strict=True))
            return tuple(_read(k, item, f"{where}[{i}]") for i, (k, item) in pairs)
    if isinstance(origin, type) and issubclass(origin, Mapping) and isinstance(data, dict):
        return {key: _read(arguments[1], item, f"{where}[{key!r}]") for key, item in data.items()}
    if isinstance(kind, type) and issubclass(kind, Enum):
        for member in kind:
            if type(member.value) is type(data) and member.value == data:
                return member
    if kind is float and type(data) in (int, float) and abs(data) < _BEYOND:
        return float(data)
    if kind in _PLAIN and type(data) is kind:
        return data
    raise PlanError(
        f"{where or 'it'} should be {getattr(kind, '__name__', kind)} and is {_SHOWN.repr(data)}",
        hint="fields of a plan part need types that JSON can say: see graphopt.plan.part.PlanPart",
    )


def _union(kinds: tuple[Any, ...], data: Any, where: str) -> Any:
    for kind in sorted(kinds, key=lambda k: k is float):  # an int stays one where both are allowed
        try:
            return _read(kind, data, where)
        except PlanError as error:
            refusal = error
    raise refusal


def _dataclass(kind: type[Any], data: dict[str, Any], where: str) -> Any:
    hints = _hints(cast("Hashable", kind))
    names = {field.name for field in dataclasses.fields(kind) if field.init}
    if names != data.keys():
        odd = sorted(names ^ data.keys())[0]
        raise PlanError(
            f"{where or kind.__name__} {'lacks the' if odd in names else 'has an unknown'} field "
            f"{odd!r}",
            hint="was it written by another version?",
        )
    values = {n: _read(hints[n], v, f"{where}.{n}".lstrip(".")) for n, v in data.items()}
    try:
        return kind(**values)
    except (TypeError, ValueError) as error:
        raise PlanError(f"{where or kind.__name__} refuses its values: {error}") from error


@lru_cache(maxsize=256)
def _hints(kind: Any) -> dict[str, Any]:
    try:
        return get_type_hints(cast("type", kind), include_extras=True)
    except NameError as error:
        raise PlanError(
            f"the types of {kind} cannot be read: {error}",
            hint="import the types of its fields outside of `if TYPE_CHECKING`",
        ) from error
