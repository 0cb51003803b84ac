"""Conditions on sizes as trees: what Python, sympy and the tree say is the same."""

from __future__ import annotations

import json
from typing import Any

import pytest
import sympy  # type: ignore[import-untyped]
from hypothesis import given
from hypothesis import strategies as st

from graphopt.capture.kept.expressions import (
    checked,
    names_in,
    ordered,
    python,
    renamed,
    symbolic,
    tree_of,
    value_of,
)
from graphopt.capture.kept.fingerprints import Unkept

NAMES = {"L['x'].size()[0]": "3", "L['y'].stride()[1]": "14"}
PLACES = {name: place for place, name in NAMES.items()}

LEAVES = st.one_of(st.integers(1, 30), st.sampled_from(sorted(PLACES)))


def _numbers(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    pair = st.tuples(st.sampled_from(["+", "-", "*", "max", "min"]), inner, inner)
    divided = st.tuples(st.sampled_from(["//", "%"]), inner, st.integers(1, 9))
    return st.one_of(pair, divided, st.tuples(st.just("negative"), inner)).map(list)


NUMBERS = st.recursive(LEAVES, _numbers, max_leaves=8)
ASKED = st.tuples(st.sampled_from(["==", "!=", "<", "<=", ">", ">="]), NUMBERS, NUMBERS).map(list)
TREES = st.recursive(
    ASKED,
    lambda inner: st.one_of(
        st.tuples(st.just("not"), inner), st.tuples(st.sampled_from(["and", "or"]), inner, inner)
    ).map(list),
    max_leaves=3,
)


class Sized:
    """Has a size and a stride."""

    def __init__(self, number: int) -> None:
        self._number = number

    def size(self) -> list[int]:
        """One size."""
        return [self._number]

    def stride(self) -> list[int]:
        """Two strides."""
        return [0, self._number]


@given(tree=TREES, n=st.integers(1, 50), m=st.integers(1, 50))
def test_a_tree_means_what_python_and_sympy_mean(tree: Any, n: int, m: int) -> None:
    tree = json.loads(json.dumps(checked(tree, PLACES)))
    text = python(tree, PLACES)
    assert tree_of(text, NAMES) == tree
    said = value_of(tree, {"3": n, "14": m})
    assert said == eval(text, {"L": {"x": Sized(n), "y": Sized(m)}})
    symbols = {name: sympy.Symbol(f"s{name}", integer=True, positive=True) for name in PLACES}
    values = {symbols["3"]: n, symbols["14"]: m}
    assert bool(symbolic(tree, symbols).xreplace(values)) == said
    other = renamed(tree, {"3": "s0", "14": "s1"})
    assert names_in(other) == {{"3": "s0", "14": "s1"}[name] for name in names_in(tree)}
    assert value_of(other, {"s0": n, "s1": m}) == said


@pytest.mark.parametrize(
    ("text", "tree"),
    [
        ("2 <= L['x'].size()[0] and 1 < 2", ["and", ["<=", 2, "3"], ["<", 1, 2]]),
        ("2 <= L['x'].size()[0] <= 9", ["and", ["<=", 2, "3"], ["<=", "3", 9]]),
        ("((-1)*L['x'].size()[0]) % 4 != 0", ["!=", ["%", ["*", ["negative", 1], "3"], 4], 0]),
        ("not (max(L['x'].size()[0], 4) == 4)", ["not", ["==", ["max", "3", 4], 4]]),
    ],
)
def test_what_dynamo_writes_is_read(text: str, tree: Any) -> None:
    assert tree_of(text, NAMES) == tree


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("L['x'].size()[0] / 2 > 1", "with L['x'].size()[0] / 2"),
        ("L['x'].size()[0] ** 2 > 1", "with L['x'].size()[0] ** 2"),
        ("L['z'].size()[0] > 1", "with L['z'].size()[0]"),
        ("math.floor(L['x'].size()[0]) > 1", "with math.floor(L['x'].size()[0])"),
        ("L['x'].size()[0] in (1, 2)", "with (1, 2)"),
        ("L['x'].size()[0]", "cannot be kept: L['x'].size()[0]"),
        ("L['x'].size()[0] > ", "cannot be kept: L['x'].size()[0] > "),
        ("True", "with True"),
    ],
)
def test_what_else_dynamo_writes_is_not_kept(text: str, reason: str) -> None:
    with pytest.raises(Unkept) as refused:
        tree_of(text, NAMES)
    where = "that " if reason.startswith("cannot") else ""
    assert str(refused.value) == f"it has a condition on sizes {where}{reason}"


def test_divisors_are_asked_of_before_they_divide() -> None:
    inner, outer = ["//", "3", "14"], ["==", ["%", 7, ["//", "3", "14"]], 0]
    assert ordered([outer, ["<=", 2, "3"]]) == [
        ["<=", 2, "3"], ["!=", "14", 0], ["!=", inner, 0], outer,
    ]  # fmt: skip
