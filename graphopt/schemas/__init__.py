"""What each command answers with ``--json``, as JSON Schemas (draft 2020-12).

An answer's first key, ``"schema": "graphopt.show/1"``, names its schema and the version of it: the
number grows where a reader of the old form would no longer understand an answer.
"""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any

_ENDING = ".json"


def names() -> list[str]:
    """Of all schemas: ``"show"``, …, as between ``graphopt.`` and the version."""
    found = (file.name for file in files(__name__).iterdir())
    return sorted(name.removesuffix(_ENDING) for name in found if name.endswith(_ENDING))


def schema(name: str) -> dict[str, Any]:
    """One of them.

    Raises:
        KeyError: there is none with this name.
    """
    if name not in names():
        raise KeyError(f"there is no schema {name!r}: {', '.join(names())}")
    text = files(__name__).joinpath(name + _ENDING).read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return found
