"""A pass from a package that is really built and installed, into a folder of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

USE_IT = """
import sys
import torch
from graphopt import registry
from graphopt.pipeline import Pipeline
from tests.support.graphs import inference_graph, linear_graph

assert registry.origins()["scale_gradients"] == "graphopt-demo 0.7", registry.origins()
assert "graphopt_demo" not in sys.modules
pipeline = Pipeline.parse("scale_gradients{factor=0.25}")
assert str(pipeline) == "scale_gradients{factor=0.25}"

w, x, tangent = torch.randn(3, 2), torch.randn(4, 3), torch.randn(4, 2)
y, before = linear_graph().module(w, x, tangent)
graph = linear_graph()
(step,) = pipeline.run(graph, verify="full")
assert [(site.site, site.what) for site in step.outcome.applied] == [("w", "scaled")]
after = graph.module(w, x, tangent)
assert torch.equal(after[0], y) and torch.equal(after[1], 0.25 * before)

(step,) = Pipeline.parse("scale_gradients{factor=1}").run(linear_graph(), verify="full")
assert [site.reason for site in step.outcome.declined] == ["factor-is-one"]
(step,) = pipeline.run(inference_graph())
assert step.skipped
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The folder into which the demo package is installed; the source tree stays untouched."""
    source = tmp_path_factory.mktemp("source") / "plugin_demo"
    target = tmp_path_factory.mktemp("target")
    shutil.copytree(ROOT / "tests" / "plugin_demo", source)
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    local = ["--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*install, *local, "--target", str(target), str(source)], check=True)
    return target


@pytest.mark.slow
def test_the_installed_pass_is_found_and_runs(installed):
    path = os.pathsep.join([str(installed), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, "-c", USE_IT]
    result = subprocess.run(
        command, env=environment, cwd=installed, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
