"""The schemas of answers; `conftest.py` holds every answer of these folder's tests against them."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from graphopt import schemas
from graphopt.cli.main import app
from tests.support.answers import checker, hold, misfits

ROOT = Path(__file__).parents[2]
SMALL = "examples/small.py:make"
FORMATS = "precision{cost=roofline,policy=tf}"
ON = ("--device", "h100")
FORMS = {
    "show": [SMALL],
    "show forward": [SMALL, "--level", "forward"],
    "run": [SMALL, "-p", "cleanup,kfac"],
    "why": [SMALL, "head.weight", "-p", FORMATS],
    "diff": [SMALL, "", "kfac"],
    "verify": [SMALL, "-p", "cleanup"],
    "verify padding": ["examples/padding.py:leaking", "--padding"],
    "plan groups": [SMALL, "--mesh", "dp=8", "-p", "kfac,group_gradients", *ON],
    "plan ddp": [SMALL, "--mesh", "dp=8", "--emit", "ddp", *ON],
    "plan formats": [SMALL, "-p", FORMATS, "--accuracy"],
    "plan stages": [SMALL, "-p", "partition{stages=2}", "--mesh", "pp=2", *ON],
    "plan weights": [SMALL, "-p", "low_rank{cost=roofline,smallest=8}"],
    "report": [SMALL, "-p", "cleanup,kfac", "--mesh", "dp=8", *ON],
    "calibrate": [SMALL, "-o", "{folder}/small.json"],
    "simulate": [SMALL, "--mesh", "dp=4", "--cluster", "summit", *ON],
    "passes": [],
    "doctor": [],
    "doctor model": [SMALL],
    "doctor branching": ["tests/support/models_for_cli.py:branching"],
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """One answer of each form."""
    folder = tmp_path_factory.mktemp("answers")
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        for form, arguments in FORMS.items():
            words = [argument.replace("{folder}", str(folder)) for argument in arguments]
            result = CliRunner().invoke(app, [form.split()[0], *words, "--json"])
            assert result.exit_code in (0, 1), f"{form}: {result.stderr}{result.exception!r}"
            found[form] = json.loads(result.stdout)
    return found


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_answer_keeps_to_its_schema(
    form: str, answers: dict[str, dict[str, Any]]
) -> None:
    hold(answers[form])


def test_every_command_and_every_schema_is_covered(answers: dict[str, dict[str, Any]]) -> None:
    named = {answer["schema"].removeprefix("graphopt.")[:-2] for answer in answers.values()}
    assert named == set(schemas.names())
    commands = {c.callback.__name__ for c in app.registered_commands if c.callback}
    assert {form.split()[0] for form in FORMS} == commands


@pytest.mark.parametrize("form", FORMS)
def test_a_key_too_many_or_too_few_is_found(form: str, answers: dict[str, dict[str, Any]]) -> None:
    answer = answers[form]
    assert misfits({**answer, "unheard of": 1})
    for key in answer.keys() - {"schema"}:
        left = {name: value for name, value in answer.items() if name != key}
        assert misfits(left) or key in ("formats", "bucket_cap_mb_list"), key


def _leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, below in items:
        if isinstance(below, dict | list):
            yield from _leaves(below, (*path, key))
        else:
            yield (*path, key)


@pytest.mark.parametrize("form", ["show", "plan groups", "plan stages", "simulate", "diff"])
def test_a_leaf_of_another_type_is_found(form: str, answers: dict[str, dict[str, Any]]) -> None:
    answer = answers[form]
    for path in list(_leaves(answer))[:40]:
        damaged = copy.deepcopy(answer)
        place = damaged
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = [[]]
        free = {"numbers", "parts", "values"} & set(map(str, path))
        if path[0] != "schema" and not free:
            assert misfits(damaged), path


def test_numbers_that_json_has_not_are_strings(answers: dict[str, dict[str, Any]]) -> None:
    for value, fine in (("Infinity", True), ("NaN", True), ("much", False), (None, False)):
        assert bool(misfits({**answers["simulate"], "forward": value})) is not fine


def test_an_unknown_schema_is_an_error() -> None:
    with pytest.raises(KeyError, match="there is no schema 'shown'"):
        schemas.schema("shown")


@pytest.mark.parametrize("name", schemas.names())
def test_schemas_are_whole(name: str) -> None:
    schema = checker(name).schema
    assert schema["$id"] == f"urn:graphopt:{name}:1"
    text = json.dumps(schema)
    for defined in schema.get("$defs", {}):
        assert f'"#/$defs/{defined}"' in text
