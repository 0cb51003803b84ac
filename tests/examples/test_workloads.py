"""All workloads: their pages, the table of criteria, and what a wheel holds of them."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from benchmarks.workloads import SEEDS, WORKLOADS
from benchmarks.workloads_table import DOCUMENT, verdict, with_criteria, with_steps
from tests.test_house import ROOT, build_wheel

RESULTS = ROOT / "benchmarks" / "results" / "workloads.json"


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_workload_has_its_files_and_pages(name: str) -> None:
    folder = ROOT / "examples" / name
    for part in ("__init__.py", "model.py", "data.py", "train.py", "README.md"):
        assert (folder / part).is_file()
    workload = importlib.import_module(f"graphopt.examples.{name}.train").WORKLOAD
    assert workload.name == name
    text = (folder / "README.md").read_text()
    assert f"python -m graphopt.examples.{name}.train" in text
    assert f"docs/images/workload_{name}." in text
    assert list((ROOT / "docs" / "images").glob(f"workload_{name}.*"))
    assert f"(../examples/{name}/README.md)" in DOCUMENT.read_text()
    assert (ROOT / "tests" / "examples" / f"test_{name}.py").is_file()


def test_the_table_is_what_was_measured() -> None:
    results = json.loads(RESULTS.read_text())["results"]
    assert list(results) == list(WORKLOADS)
    assert with_criteria(DOCUMENT.read_text(), results) == DOCUMENT.read_text()
    for workload in results.values():
        assert list(workload["seeds"]) == [str(seed) for seed in SEEDS]
        for seed, found in workload["seeds"].items():
            assert found["settings"]["seed"] == int(seed)


def test_the_steps_are_what_was_measured() -> None:
    results = json.loads((RESULTS.parent / "workload_steps_cpu.json").read_text())["results"]
    assert list(results) == list(WORKLOADS)
    assert with_steps(DOCUMENT.read_text(), results) == DOCUMENT.read_text()
    assert {found["captured as"] for found in results.values()} == {"1 graph, 0 plain"}


def test_a_criterion_holds_where_it_holds_with_each_seed() -> None:
    good, bad = {"holds": True, "gate": True}, {"holds": False, "gate": True}
    assert verdict([good, good, good]) == "holds"
    assert verdict([good, bad, bad]) == "**fails** with 2"
    assert verdict([{**bad, "gate": False}]) == "**fails** with 1 (for information)"
    with pytest.raises(ValueError, match="no marks"):
        with_criteria("no table here", {})


def test_results_of_different_criteria_make_no_table() -> None:
    def found(bound: float) -> dict[str, Any]:
        criterion = {"name": "error", "value": 1.0, "relation": "<=", "bound": bound, "gate": True}
        return {"criteria": [{**criterion, "holds": True}], "seconds": {}}

    text = DOCUMENT.read_text()
    same = {"speech": {"seeds": {"0": found(2), "1": found(2)}}}
    assert "| error | ≤ 2 | 1, 1 | holds |" in with_criteria(text, same)
    with pytest.raises(ValueError, match="speech were run with different criteria"):
        with_criteria(text, {"speech": {"seeds": {"0": found(2), "1": found(3)}}})


@pytest.mark.slow
def test_workloads_run_from_a_wheel(tmp_path: Path) -> None:
    """Away from the checkout, from nothing but what is installed."""
    site = tmp_path / "site"
    with zipfile.ZipFile(build_wheel(tmp_path)) as wheel:
        wheel.extractall(site)
    code = f"""
import importlib, sys
sys.path.insert(0, {str(site)!r})
for name in {WORKLOADS!r}:
    module = importlib.import_module(f"graphopt.examples.{{name}}.train")
    assert module.__file__.startswith({str(site)!r}), module.__file__
    case = module.WORKLOAD.case(__import__("torch").device("cpu"))
    case.loss(case.model(*case.inputs)).backward()
    assert any(p.grad is not None for p in case.model.parameters())
    try:
        module.WORKLOAD.main(["--help"])
    except SystemExit as end:
        assert end.code == 0
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, timeout=300)
