"""Answers by ``--json``, held against the schemas that are shipped."""

from __future__ import annotations

from functools import cache
from typing import Any

from jsonschema import Draft202012Validator

from graphopt import schemas


@cache
def checker(name: str) -> Draft202012Validator:
    schema = schemas.schema(name)
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


def misfits(document: dict[str, Any]) -> list[str]:
    """What in an answer its schema does not allow."""
    name, slash, version = document["schema"].removeprefix("graphopt.").rpartition("/")
    assert (slash, version) == ("/", "1")
    return [
        f"{error.json_path}: {inner.message}"
        for error in checker(name).iter_errors(document)
        for inner in (error.context or [error])
    ]


def hold(document: dict[str, Any]) -> None:
    assert not (found := misfits(document)), "\n".join(found)
