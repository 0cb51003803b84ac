"""Steps of Inductor that a later process takes over, and what makes such a step another one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, fx, nn
from torch._inductor import config
from torch._inductor.decomposition import decompositions

import graphopt
from graphopt.model import surface
from graphopt.runtime.backends import inductor, inductor_code
from tests.capture.test_kept_damaged import body, signed
from tests.model.test_kept_steps import Ran, step


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "graphs"))


def compiled(**options: Any) -> Ran:
    return step(backend="inductor", **options)


def _kept(folder: Path) -> Path:
    (file,) = (folder / "graphs" / "graphopt" / "steps").iterdir()
    return file


@pytest.fixture
def nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it to have everything behind the capture refused."""

    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError

    def refuse() -> None:
        from torch._inductor import compile_fx

        for name in ("decompose", "split", "prepare_inference"):
            monkeypatch.setattr(inductor, name, never)
        monkeypatch.setattr(compile_fx._InProcessFxCompile, "codegen_and_compile", never)

    return refuse


@pytest.mark.parametrize("grad", [True, False])
def test_a_compiled_step_is_taken_over_bit_for_bit(
    grad: bool, nothing_is_compiled: Callable[[], None]
) -> None:
    first, plain = compiled(grad=grad), compiled(grad=grad, cache="off")
    nothing_is_compiled()
    second = compiled(grad=grad)
    assert (first.taken, second.taken, plain.taken) == (False, True, False)
    assert first.bits == second.bits == plain.bits
    one, other = (surface.report(run.model).specialisations[-1] for run in (first, second))
    assert other.backend == one.backend
    assert other.backend.backend == "inductor"
    assert other.plan == one.plan


def test_what_auto_has_chosen_is_taken_over(
    monkeypatch: pytest.MonkeyPatch, nothing_is_compiled: Callable[[], None]
) -> None:
    seconds = {"eager": 2.0, "inductor": 1.0}
    monkeypatch.setattr("graphopt.model.backend_choice.times", lambda *_: seconds)
    first = step(backend="auto")
    nothing_is_compiled()
    second = step(backend="auto")
    assert second.taken
    assert second.bits == first.bits
    assert surface.report(second.model).specialisations[-1].backend.backend == "inductor"


PROGRAM = """
import hashlib, json
import torch
from torch._dynamo.utils import counters
from graphopt.model import surface
torch.manual_seed(0)  # the inputs are drawn by the next line
from tests.model.test_kept_steps import step
ran = step(backend="inductor")
found = counters["inductor"]["fxgraph_cache_hit"], counters["inductor"]["fxgraph_cache_miss"]
bits = hashlib.sha256(b"".join(ran.bits)).hexdigest()
print(json.dumps([ran.taken, surface.report(ran.model).specialisations[-1].route, found, bits]))
"""


def test_another_process_finds_graph_and_code(tmp_path: Path) -> None:
    own = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "code"), "OMP_NUM_THREADS": "1"}
    said = []
    for _ in range(2):
        run = subprocess.run(
            [sys.executable, "-c", PROGRAM],
            env={**os.environ, **own},
            capture_output=True,
            text=True,
            timeout=300,
            check=True,
        )
        said.append(json.loads(run.stdout.splitlines()[-1]))
    (taken, route, _, bits), (again, later, (hits, misses), same) = said
    assert (taken, route, again, later) == (False, "dynamo", True, "kept")
    assert (hits, misses) == (2, 0)
    assert bits == same


def test_code_that_is_gone_is_generated_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    runs = []
    for name in ("one", "other"):
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / name))
        runs.append(compiled())
        shutil.rmtree(tmp_path / name)
    assert [run.taken for run in runs] == [False, True]
    assert runs[0].bits == runs[1].bits


def _a_pass_of_the_user(graph: fx.Graph) -> None:
    pass


CHANGED: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "a setting of Inductor": lambda: config.patch(pattern_matcher=False),
    "a pass of the user": lambda: config.patch(joint_custom_post_pass=_a_pass_of_the_user),
    "a decomposition of the user": lambda: mock.patch.dict(
        decompositions, {torch.ops.aten.relu.default: lambda x: x.clamp(min=0.0)}
    ),
}


@pytest.mark.parametrize("name", CHANGED)
def test_other_graphs_for_inductor_are_other_steps(name: str) -> None:
    compiled()
    with CHANGED[name]():
        assert not compiled().taken


def _half(entry: Any, half: str, **values: Any) -> Any:
    engine = entry["engine"]
    return {**entry, "engine": {**engine, half: {**engine[half], **values}}}


POISONS: dict[str, Callable[[Any], Any]] = {
    "no graph": lambda e: _half(e, "forward", lines=None),
    "no forms": lambda e: _half(e, "forward", forms=[]),
    "an operator that reads a file": lambda e: _half(
        e,
        "backward",
        operators=["aten.from_file.default"] * len(e["engine"]["backward"]["operators"]),
    ),
    "results of others": lambda e: _half(e, "backward", returns=[{"v": 0}]),
    "of the eager backend": lambda e: {**e, "backend": {**e["backend"], "backend": "eager"}},
}


@pytest.mark.parametrize("name", POISONS)
def test_what_is_poisoned_is_no_compiled_step(name: str, tmp_path: Path) -> None:
    first = compiled()
    file = _kept(tmp_path)
    file.write_text(signed(file, POISONS[name](body(file))))
    with pytest.warns(RuntimeWarning, match="is damaged and is made anew") as said:
        second = compiled()
    assert len([w for w in said if "a kept" in str(w.message)]) == 1
    assert second.bits == first.bits
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compiled().taken


def test_a_compiler_that_is_gone_is_no_damage(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The entry stays for a process that has one, and the call falls back as ever."""
    compiled()
    before = _kept(tmp_path).read_text()
    monkeypatch.setattr(inductor_code.shutil, "which", lambda _: None)
    second = compiled()
    assert not second.taken
    assert surface.report(second.model).specialisations[-1].backend.backend == "eager"
    assert _kept(tmp_path).read_text() == before


class Nothing(nn.Module):
    """No input, and a parameter that forward does not read."""

    def __init__(self) -> None:
        super().__init__()
        self.unread = nn.Parameter(torch.ones(1))

    def forward(self) -> Tensor:
        """A constant."""
        return torch.arange(3.0).sin()


def test_a_graph_without_inputs_runs_in_eager(caplog: pytest.LogCaptureFixture) -> None:
    model = graphopt.optimize(Nothing().eval(), backend="inductor")
    with torch.no_grad():
        assert torch.equal(model(), torch.arange(3.0).sin())
    assert "Inductor is not given graphs without inputs" in caplog.text
