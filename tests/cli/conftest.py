"""Whatever a command answers with ``--json`` in these tests is held against its schema."""

from __future__ import annotations

import json
from collections.abc import Mapping

import pytest

from graphopt.cli import console
from tests.support.answers import hold


@pytest.fixture(autouse=True)
def _answers_keep_to_their_schemas(monkeypatch: pytest.MonkeyPatch) -> None:
    written = console.document

    def document(command: str, answer: Mapping[str, object]) -> str:
        text = written(command, answer)
        hold(json.loads(text))
        return text

    monkeypatch.setattr(console, "document", document)
