"""Tables of the page of figures are made of kept results, whatever rows these have."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.families import summary
from benchmarks.measured import PAGE, page, table
from benchmarks.tables import TABLES

OVER = {"median": 0.95, "low": 0.9, "high": 1.0}
MARKED = "before\n<!-- table {0} -->\nold\n<!-- end of table -->\nafter\n"


def _keep(folder: Path, name: str, results: object) -> None:
    record = {"date": "2026-01-02T03:04:05", "commit": "abc", "machine": "one core"}
    (folder / f"{name}.json").write_text(json.dumps({**record, "results": results}))


def test_what_stands_between_marks_is_made_anew(tmp_path: Path) -> None:
    model = {"CPU milliseconds": {"eager": 2.0, "graphopt": 1.9}, "graphopt over eager": OVER}
    sums = {"models": 1, "median": 0.95, "worst": 0.95, "worst model": "net"}
    _keep(tmp_path, "zoo_steps_cpu", {"models": {"net": model}, "small": sums, "large": {}})
    found = page(MARKED.format("zoo_steps"), tmp_path)
    assert (
        found
        == """before
<!-- table zoo_steps -->

[`zoo_steps_cpu.json`](../benchmarks/results/zoo_steps_cpu.json): 2026-01-02, commit abc, one core.

| model | eager, ms | graphopt over eager |
|---|---|---|
| net | 2.0 | 0.950 (0.900 to 1.000) |

- 1 models, small: median **0.950**, worst **0.950** (net).

<!-- end of table -->
after
"""
    )
    assert page(found, tmp_path) == found


def test_a_result_that_is_not_there_yet(tmp_path: Path) -> None:
    for name in TABLES:
        assert table(name, tmp_path) == "\nNot measured yet.\n\n"


def test_rows_and_columns_come_and_go(tmp_path: Path) -> None:
    """What was not measured of a row is an empty cell."""
    rows = {
        "a": {"milliseconds": {"graphopt": 1.0}, "over eager": OVER, "over freezing": OVER},
        "b": {"milliseconds": {"graphopt": 2.0}, "over eager": OVER, "runs": "packed"},
    }
    _keep(tmp_path, "inference", {"models": rows})
    text = table("inference", tmp_path)
    assert "| model | ms | form | over eager | over freezing |" in text
    assert "| b | 2.0 | packed | 0.95 (0.90 to 1.00) |  |" in text
    held = {"saved": 1000, "peak": 2000}
    of = {"saved over eager": 1.0, "peak over eager": 1.0}
    models = {
        "a": {"bytes": {"eager": held, "graphopt": held, "compiled": held}, **of},
        "b": {"bytes": {"eager": held, "graphopt": held}, **of},
    }
    _keep(tmp_path, "memory_cpu", models)
    assert "| b | 0.00 | 1.000 |  | 0.00 | 1.000 |  |  |" in table("memory", tmp_path)


def test_a_mark_without_a_table() -> None:
    with pytest.raises(ValueError, match=r"no table is called 'nothing'; .* has training, folded"):
        page(MARKED.format("nothing"))


def test_every_table_is_on_the_page() -> None:
    text = PAGE.read_text()
    assert [name for name in TABLES if f"<!-- table {name} -->" not in text] == []


def test_families_that_are_refused_are_told_with_their_reasons(tmp_path: Path) -> None:
    same = {"status": "bit-equal", "error": 0.0, "captures": 2}
    rows = {
        "timm a": same | {"CPU seconds": {"two steps with capture": 3.0}},
        "timm b": {
            "status": "refused",
            "reason": "forward branches",
            "where": "x/y.py:7: if a | b:",
        },
        "transformers C": {
            "status": "within 1e-6",
            "error": 2e-7,
            "worst": "1 loss",
            "eager against eager": {"error": 0.0},
        },
    }
    packages = {"timm": "1.0", "transformers": "5.0"}
    kept = {"packages": packages, "listed": 4, "summary": summary(rows), "families": rows}
    _keep(tmp_path, "families", kept)
    text = table("families", tmp_path)
    assert "| timm 1.0 | 2 | 1 | 0 | 0 | 0 | 1 | 0 |" in text
    assert "| both | 3 | 1 | 1 | 0 | 0 | 1 | 0 |" in text
    assert "- 3 of 4 families that are listed were run." in text
    assert "median 3.0, most 3.0 (timm a)" in text
    assert "- Captured anew in the second step: timm a." in text
    assert "| transformers C | 2.0e-07 | 1 loss | 0.0e+00 |" in text
    assert "| timm b | forward branches | `if a \\| b:` in y.py:7 |" in text
