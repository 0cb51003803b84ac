"""Passes with plan and runtime parts from a package that is really built and installed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.drive_demo import DRIVES

ROOT = Path(__file__).resolve().parents[1]
NET = f"{ROOT / 'tests/support/models_for_cli.py'}:net"


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The folder into which the demo package is installed; the source tree stays untouched."""
    source = tmp_path_factory.mktemp("source") / "plugin_demo"
    wheels = tmp_path_factory.mktemp("wheels")
    target = tmp_path_factory.mktemp("target")
    shutil.copytree(ROOT / "tests" / "plugin_demo", source)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    local = ["--no-deps", "--no-index"]
    build = [*pip, "wheel", *local, "--no-build-isolation", "--wheel-dir", str(wheels), str(source)]
    subprocess.run(build, check=True)
    (wheel,) = wheels.glob("graphopt_demo-*.whl")
    subprocess.run([*pip, "install", *local, "--target", str(target), str(wheel)], check=True)
    return target


def _run(installed: Path, *arguments: str) -> str:
    path = os.pathsep.join([str(installed), str(ROOT)])
    result = subprocess.run(
        [sys.executable, "-m", *arguments],
        env={**os.environ, "PYTHONPATH": path, "COLUMNS": "200"},
        cwd=installed,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.parametrize("drive", DRIVES)
def test_the_installed_package(installed: Path, drive: str) -> None:
    _run(installed, "tests.support.drive_demo", drive)


def test_the_command_line_knows_it(installed: Path) -> None:
    listed = json.loads(_run(installed, "graphopt", "passes", "--json"))["passes"]
    (entry,) = [p for p in listed if p["name"] == "scale_by_peak"]
    assert entry["origin"] == "graphopt-demo 0.8"
    assert [o["name"] for o in entry["options"]] == ["decay"]

    spec = ["-p", "cleanup,scale_by_peak"]
    assert "scales the gradients of" in _run(installed, "graphopt", "run", NET, *spec)
    told = json.loads(_run(installed, "graphopt", "why", NET, "stem.weight", *spec, "--json"))
    (found,) = [d for d in told["decisions"] if d["pass"] == "scale_by_peak"]
    (applied,) = found["applied"]
    assert "stem.weight" in applied["what"]
