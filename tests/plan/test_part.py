"""Plan parts go to JSON and back by their type hints, or say in one sentence why not."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from typing import Any, ClassVar, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from graphopt.errors import PlanError
from graphopt.plan import PlanPart
from graphopt.plan.part import from_data, to_data
from graphopt.plan.plan import check_part


class Kind(StrEnum):
    A = "a"
    B = "b"


class Number(Enum):
    ONE = 1


@dataclass(frozen=True)
class Inner:
    name: str
    sizes: tuple[int, ...] = ()


@dataclass(frozen=True)
class Everything(PlanPart):
    name: ClassVar[str] = "everything"

    flag: bool
    count: int
    share: float
    text: str
    maybe: int | None
    either: int | float | str
    kind: Kind
    number: Number
    word: Literal["x", "y", 3]
    pair: tuple[int, str]
    many: tuple[Inner, ...]
    table: Mapping[str, Inner]
    plain: dict[str, tuple[float, ...]]
    default: Inner = field(default=Inner("default"))


finite = st.floats(allow_nan=False)
inner = st.builds(Inner, st.text(), st.lists(st.integers()).map(tuple))
everything = st.builds(
    Everything,
    flag=st.booleans(),
    count=st.integers(),
    share=finite,
    text=st.text(),
    maybe=st.none() | st.integers(),
    either=st.integers() | finite | st.text(),
    kind=st.sampled_from(Kind),
    number=st.sampled_from(Number),
    word=st.sampled_from(["x", "y", 3]),
    pair=st.tuples(st.integers(), st.text()),
    many=st.lists(inner, max_size=3).map(tuple),
    table=st.dictionaries(st.text(), inner, max_size=3),
    plain=st.dictionaries(st.text(), st.lists(finite).map(tuple), max_size=3),
    default=inner,
)


@given(everything)
def test_a_part_survives_json(part: Everything) -> None:
    read = from_data(Everything, json.loads(json.dumps(to_data(part))))
    assert read == part
    types = [[type(getattr(p, name)) for name in ("flag", "either", "kind")] for p in (part, read)]
    assert types[0] == types[1]
    check_part(part, "everything")


def _part(kind: Any, value: Any) -> PlanPart:
    """A part with one field of this type."""
    body = {"name": "demo", "__annotations__": {"value": kind}, "__module__": __name__}
    made = dataclass(frozen=True)(type("Demo", (PlanPart,), body))
    return made(value)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("kind", "value", "sentence"),
    [
        (object, torch.zeros(2), "value is a Tensor, which JSON does not have"),
        (object, torch.float32, "value is a dtype, which JSON does not have"),
        (object, {1, 2}, "value is a set, which JSON does not have"),
        (object, {1: "a"}, "value is a dict, which JSON does not have"),
        (tuple[object, ...], (1, (2, print)), r"value\[1\]\[1\] is a builtin_function_or_method"),
        (dict[str, object], {"a": Inner}, r"value\['a'\] is a type"),
        (list[int], [1], r"value should be list\[int\]|value should be list"),
        (int, 1.5, "value should be int and is 1.5"),
        (float, float("nan"), "demo.value is NaN, which no plan may hold"),
        (object, float("nan"), "demo.value is NaN"),
        (dict[str, float | None], {"a": float("nan")}, r"demo.value\['a'\] is NaN"),
        (int, True, "value should be int and is True"),
    ],
)
def test_a_part_that_cannot_be_converted(kind: Any, value: Any, sentence: str) -> None:
    with pytest.raises(PlanError, match=sentence):
        check_part(_part(kind, value), "demo")


@pytest.mark.parametrize(
    ("kind", "data", "sentence"),
    [
        (Inner, {"name": "a"}, "Inner lacks the field 'sizes'"),
        (Inner, {"name": "a", "sizes": [], "more": 1}, "Inner has an unknown field 'more'"),
        (Inner, {"name": "a", "sizes": [1, "b"]}, r"sizes\[1\] should be int and is 'b'"),
        (Inner, 3, "it should be Inner and is 3"),
        (tuple[int, str], [1], "it should be"),
        (Kind, "c", "it should be Kind and is 'c'"),
        (Literal["x"], "z", "it should be"),
        (int | None, "z", "it should be"),
        (float | None, float("nan"), "it is NaN, which no plan may hold"),
        (tuple[float, ...], [1.0, float("nan")], r"\[1\] is NaN"),
        (Mapping[str, int], {"a": "b"}, r"\['a'\] should be int"),
    ],
)
def test_data_that_does_not_fit(kind: Any, data: Any, sentence: str) -> None:
    with pytest.raises(PlanError, match=sentence):
        from_data(kind, data)


@dataclass(frozen=True)
class Picky:
    size: int

    def __post_init__(self) -> None:
        if self.size < 0:
            raise ValueError("a size is not negative")


def test_a_class_that_refuses_its_values() -> None:
    with pytest.raises(PlanError, match="Picky refuses its values: a size is not negative"):
        from_data(Picky, {"size": -1})


def test_parts_that_are_none() -> None:
    class Loose(PlanPart):
        name = "loose"

        def __init__(self) -> None:
            object.__setattr__(self, "value", 3)

    with pytest.raises(PlanError, match="its plan part is a dict, not a PlanPart"):
        check_part({"a": 1}, "demo")
    with pytest.raises(PlanError, match="its plan part says its name is 'demo'"):
        check_part(_part(int, 1), "other")
    with pytest.raises(PlanError, match="is a Loose, which is no dataclass"):
        check_part(Loose(), "loose")


def test_types_that_cannot_be_read() -> None:
    with pytest.raises(PlanError, match="cannot be read: name 'Missing' is not defined"):
        check_part(_part("Missing", 1), "demo")
