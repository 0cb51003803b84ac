"""Passes with plan and runtime parts from a package that is really built and installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.drive_demo import DRIVES

ROOT = Path(__file__).resolve().parents[1]


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


@pytest.mark.slow
@pytest.mark.distributed
def test_the_installed_package(installed: Path) -> None:
    """Everything in one process, as starting one costs more than most of what is driven."""
    path = os.pathsep.join([str(installed), str(ROOT)])
    result = subprocess.run(
        [sys.executable, "-m", "tests.support.drive_demo"],
        env={**os.environ, "PYTHONPATH": path},
        cwd=installed,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.splitlines() == list(DRIVES)
