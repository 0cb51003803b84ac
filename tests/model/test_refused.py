"""Every row of the documented tables: it is refused as they say, changes nothing, has a way out."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import graphopt
from graphopt.errors import CaptureError
from graphopt.model.controller import controller_of
from tests.support.refusals.example import Example, Step, random_states, seed
from tests.support.refusals.table import ALL, DOCUMENT, with_tables

EXAMPLES = {f"{row.name} - {one.name}": one for row in ALL for one in row.examples}
each_example = pytest.mark.parametrize("example", EXAMPLES.values(), ids=EXAMPLES)
EXACTLY = {"rtol": 0.0, "atol": 0.0}


class Stops(nn.Module):
    """Is called, and does nothing."""

    def forward(self, *_: object) -> None:
        raise InterruptedError


def _optimized(example: Example, **options: Any) -> Any:
    seed()
    return graphopt.optimize(example.model(), backend="eager", **{**example.options, **options})


def _eager(make: Any) -> nn.Module:
    seed()
    return make()  # type: ignore[no-any-return]


def _outcome(model: nn.Module, step: Step) -> object:
    """What a step returns, or the error that it raises."""
    seed()
    try:
        return step(model)
    except Exception as error:
        return type(error).__name__, str(error)


def _assert_same(actual: object, expected: object, **tolerance: float) -> None:
    left, right = pytree.tree_leaves(actual), pytree.tree_leaves(expected)
    assert len(left) == len(right), (actual, expected)
    for a, b in zip(left, right, strict=True):
        if isinstance(a, Tensor):
            torch.testing.assert_close(a, b, equal_nan=True, **tolerance)
        else:
            assert a == b


def _state(model: Any) -> list[Tensor]:
    gradients = [p.grad for p in model.parameters()]
    own = [model.generator.get_state()] if hasattr(model, "generator") else []
    return [t.clone() for t in (*model.state_dict().values(), *gradients, *own)]


@each_example
def test_it_is_refused_in_fitting_words_and_changes_nothing(example: Example) -> None:
    model = _optimized(example)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    before, kept = _state(model), list(getattr(model, "kept", ()))
    seed()
    with pytest.raises(example.error, match=f"(?s){example.words}") as caught:
        example.step(model)
    error: Any = caught.value
    if example.line:
        assert example.line in error.where
    if example.hint:
        assert re.search(example.hint, error.hint), error.hint
    assert controller_of(model) is not None
    if example.error is CaptureError and not example.options:  # refused at the first call
        states = random_states()
        seed()
        with pytest.raises(InterruptedError):
            example.step(Stops())
        assert random_states() == states
        _assert_same(_state(model), before, **EXACTLY)
        assert list(getattr(model, "kept", ())) == kept


@pytest.mark.parametrize(
    "example",
    [one for one in EXAMPLES.values() if one.plain],
    ids=[name for name, one in EXAMPLES.items() if one.plain],
)
def test_fallback_runs_it_as_eager_does(example: Example) -> None:
    expected = _outcome(_eager(example.model), example.step)
    with pytest.warns(UserWarning, match="plain PyTorch"):
        actual = _outcome(_optimized(example, fallback="eager"), example.step)
    _assert_same(actual, expected, **EXACTLY)


@pytest.mark.parametrize(
    "example",
    [one for one in EXAMPLES.values() if one.way],
    ids=[name for name, one in EXAMPLES.items() if one.way],
)
def test_the_way_out_is_captured_and_equals_eager(example: Example) -> None:
    way = example.way
    assert way is not None
    expected = _outcome(_eager(way.model), way.step)
    assert not isinstance(expected, tuple), expected
    optimized = graphopt.optimize(_eager(way.model), backend="eager", fallback="error")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*plain PyTorch")
        _assert_same(_outcome(optimized, way.step), expected, **EXACTLY)
    assert controller_of(optimized).made > 0
    if way.same:
        _assert_same(expected, _outcome(_eager(example.model), example.step), rtol=1e-5, atol=1e-6)


def test_every_row_is_tested() -> None:
    for row in ALL:
        file, _, name = row.tested_by.partition("::")
        proof = not name or f"def {name}(" in (DOCUMENT.parents[1] / file).read_text()
        assert proof and (row.examples or name), row.name  # noqa: PT018


def test_the_tables_are_those_of_the_document() -> None:
    document = DOCUMENT.read_text()
    assert with_tables(document) == document, "run `python -m tests.support.refusals`"
