"""The first hour with nothing but the wheel: no clone on the path, no extra installed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.test_docs import README
from tests.test_house import build_wheel

EXTRAS = ("hypothesis", "uvicorn", "matplotlib", "transformers", "sklearn", "skimage", "triton")

# What a reader writes: a module, a loop, what it says; with the README's example before it.
SESSION = """
import torch, graphopt
from torch import nn

class Mine(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 16)
        self.out = nn.Linear(16, 3)

    def forward(self, x):
        return self.out(torch.tanh(self.inner(x)))

def train(optimized):
    torch.manual_seed(1)
    mine = Mine()
    optimizer = torch.optim.AdamW(mine.parameters())
    if optimized:
        assert graphopt.optimize(mine, backend="eager") is mine
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(mine(torch.randn(8, 6)), torch.randint(3, (8,)))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return mine, losses

mine, losses = train(True)
assert losses == train(False)[1]
assert "cleanup: " in mine.explain() and "bit-equal" in mine.explain()
assert "Mine" in mine._repr_html_()
fresh = graphopt.optimize(Mine())
for said in (fresh.explain(), fresh._repr_html_()):
    assert "nothing is captured yet: the first call does it" in said
print(graphopt.__file__)
"""

MODEL = """
import torch
from torch import nn

def make():
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)), (torch.randn(8, 6),)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the installed wheel, in which packages of extras cannot be imported."""
    folder = tmp_path_factory.mktemp("wheel")
    site = folder / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
    subprocess.run([*install, str(site), str(build_wheel(folder))], check=True)
    hidden = f"import sys\nsys.modules.update(dict.fromkeys({EXTRAS!r}))\n"
    (site / "sitecustomize.py").write_text(hidden)
    return site


def run(
    wheel: Path, folder: Path, arguments: Sequence[str], code: int = 0
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(wheel), "COLUMNS": "80", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


@pytest.mark.slow
def test_a_first_session(wheel: Path, tmp_path: Path) -> None:
    first = re.search(r"^```python # runs\n(.*?)^```\n", README.read_text(), re.M | re.S)
    assert first is not None
    (tmp_path / "session.py").write_text(first[1] + SESSION)
    printed = run(wheel, tmp_path, ["session.py"]).stdout.splitlines()
    assert printed == ["True True True", str(wheel / "graphopt" / "__init__.py")]


@pytest.mark.slow
def test_first_commands(wheel: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MODEL)
    command = ["-m", "graphopt"]
    passes = run(wheel, tmp_path, [*command, "passes", "--json"]).stdout
    assert json.loads(passes)["schema"] == "graphopt.passes/1"
    run(wheel, tmp_path, [*command, "report", "mine.py:make", "-o", "mine.html"])
    page = (tmp_path / "mine.html").read_text()
    assert "0.weight" in page
    assert "<style>" in page
    text = run(wheel, tmp_path, [*command, "show", "mine.py:make", "--text"]).stdout
    (tmp_path / "mine.gopt").write_text(text)
    verified = run(wheel, tmp_path, [*command, "verify", "mine.gopt", "-p", "cleanup"]).stdout
    assert "bit-equal" in verified


MISSING = """
import runpy
from graphopt.errors import ExtraError
from graphopt.testing import CORPUS

def check():
    from graphopt.testing import check_pass

for action in (
    check,
    lambda: runpy.run_module("graphopt.testing.fuzz", run_name="__main__"),
    lambda: runpy.run_module("graphopt.examples.train_digits", run_name="__main__"),
    lambda: runpy.run_module("graphopt.examples.noise_scale.train", run_name="__main__"),
    CORPUS["gpt2"].make,
):
    try:
        action()
    except ExtraError as error:
        assert isinstance(error, ModuleNotFoundError)
        print(error.name, error)
"""


@pytest.mark.slow
def test_a_package_that_is_missing_is_named(wheel: Path, tmp_path: Path) -> None:
    said = run(wheel, tmp_path, ["-c", MISSING]).stdout
    for package, what, extra in [
        ("hypothesis", "what generates graphs", "testing"),
        ("hypothesis", "what generates training code", "testing"),
        ("sklearn", "this example", "examples"),
        ("sklearn", "this example", "examples"),
        ("transformers", "this model of the corpus", "corpus"),
    ]:
        line = (
            f"{package} [GO-X01] {what} needs {package}, which is not installed\n"
            f"  try: pip install 'graphopt[{extra}]'\n"
        )
        assert said.startswith(line)
        said = said.removeprefix(line)
    assert said == ""


@pytest.mark.slow
def test_a_workload_says_what_is_missing_before_it_trains(wheel: Path, tmp_path: Path) -> None:
    example = ["-m", "graphopt.examples.unknown_operator.train", "--output", "out"]
    said = run(wheel, tmp_path, example, code=2).stderr
    assert said == ("error: matplotlib is not installed\n  try: pip install 'graphopt[examples]'\n")
