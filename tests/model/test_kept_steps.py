"""Steps that a later process takes over from an earlier one, and what makes a step another one."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch._functorch.config
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import graphopt
from graphopt.capture.kept import store
from graphopt.graph import Graph
from graphopt.model import remembered, surface
from graphopt.model.kept_steps import STORE, KeptStep, Steps
from graphopt.passbase import Outcome, Pass, PassContext
from graphopt.passes.cleanup import Cleanup
from graphopt.pipeline import Pipeline
from graphopt.runtime.session import Session
from tests.capture.test_kept_damaged import _places, body, signed


class Net(nn.Module):
    """Statistics, dropout, a constant, a result that is a view of an input."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor, mask: Tensor) -> dict[str, Any]:
        """Two layers."""
        y = F.dropout(self.norm(self.first(x)).relu_(), 0.3, self.training)
        y = self.second(torch.where(mask, y, torch.tensor([1.0, 2.0, 3.0, 4.0])))
        return {"y": y.clamp(max=3.0), "two": [y.sum(), 7], "x": x.t()}


X, MASK = torch.randn(3, 4), torch.ones(3, 4) > 0


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@dataclass(frozen=True)
class Ran:
    """A step in a process of its own, as far as graphopt can tell.

    Attributes:
        taken: whether it was an earlier process's.
        bits: of all results, gradients and buffers.
        model: after it.
    """

    taken: bool
    bits: list[bytes]
    model: nn.Module


def step(make: Callable[[], nn.Module] = Net, *, grad: bool = True, **options: Any) -> Ran:
    """Build and optimize a model, and take a step."""
    found: list[object] = []

    class Watched(Steps):
        def found(self, digest: str) -> KeptStep | None:
            found.append(super().found(digest))
            return found[-1]  # type: ignore[return-value]

    torch.manual_seed(0)
    model = make()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("graphopt.compiler.making.Steps", Watched)
        graphopt.optimize(model, **{"backend": "eager"} | options)
        torch.manual_seed(1)
        with torch.set_grad_enabled(grad):
            out = model(X, MASK)
        if grad:
            (out["y"].square().sum() + out["two"][0]).backward()
    assert out["two"][1] == 7
    assert out["x"].data_ptr() == X.data_ptr()
    tensors = [out["y"], out["two"][0], *model.buffers()]
    tensors += [p.grad for p in model.parameters() if p.grad is not None]
    bits = [t.detach().numpy().tobytes() for t in tensors]
    return Ran(any(found), bits, model)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("verify", ["eager", "structure", "off"])
def test_a_step_is_taken_over_bit_for_bit(grad: bool, verify: str) -> None:
    first, second = step(grad=grad, verify=verify), step(grad=grad, verify=verify)
    plain = step(grad=grad, cache="off")
    assert (first.taken, second.taken, plain.taken) == (False, True, False)
    assert first.bits == second.bits == plain.bits
    one, other = (surface.report(run.model).specialisations[-1] for run in (first, second))
    told = [replace(step, seconds=0.0, verify_seconds=0.0, earlier=True) for step in one.steps]
    assert other.steps == tuple(told)
    assert (other.plan, other.backend, other.level) == (one.plan, one.backend, one.level)
    lines = second.model.explain().splitlines()  # type: ignore[operator]
    assert any("by kept" in line for line in lines)
    assert any("cleanup" in line and "by an earlier process" in line for line in lines)


def test_nothing_is_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    step()

    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError

    for name in ("graphs.parse_graph", "entry.read_graph"):
        monkeypatch.setattr(f"graphopt.capture.kept.{name}", never)
    monkeypatch.setattr(Pipeline, "run", never)
    assert step().taken


def test_a_taken_step_goes_on_as_any_other() -> None:
    """Further steps, evaluation, other shapes, states and copies."""
    models = [step(cache="off").model, (step(), step())[1].model]
    seen = []
    for model in models:
        torch.manual_seed(2)
        for x in (X, X + 1, torch.randn(5, 4)):
            out = model(x, torch.ones(x.shape) > 0)
            out["y"].sum().backward()
        model.eval()
        with torch.no_grad():
            seen.append([model(X, MASK)["y"], *model.state_dict().values()])
    assert all(map(torch.equal, *seen))


@dataclass(frozen=True)
class Nothing(Pass):
    """Does nothing."""

    name: ClassVar[str] = "nothing"
    lasting: ClassVar[bool] = True
    symbolic: ClassVar[bool] = True
    size: int = 1

    def apply(self, graph: Graph, ctx: PassContext) -> Outcome:
        """Nothing."""
        return Outcome()


@dataclass(frozen=True)
class Measuring(Nothing):
    """May do something else in another process."""

    lasting: ClassVar[bool] = False


CHANGED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "passes": ({}, {"passes": []}),
    "an option": ({"passes": [Nothing()]}, {"passes": [Nothing(size=2)]}),
    "verify": ({}, {"verify": "full"}),
    "mesh": ({"passes": []}, {"passes": [], "mesh": {"dp": 1}}),
    "captures only": ({}, {"cache": "captures"}),
    "a pass that measures": ({"passes": [Measuring()]}, {"passes": [Measuring()]}),
}


@pytest.mark.parametrize("name", CHANGED)
def test_another_way_to_make_it_is_another_step(name: str) -> None:
    first, second = CHANGED[name]
    assert not step(**first).taken
    assert not step(**second).taken


def _code_of_pass(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Cleanup, "apply", lambda self, graph, ctx: Outcome())


SURROUNDINGS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "code of a pass": _code_of_pass,
    "code of graphopt": lambda p: p.setattr(remembered, "sources", lambda: "another"),
    "version of torch": lambda p: p.setattr(torch, "__version__", "2.13.9"),
    "processor": lambda p: p.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "another"),
    "threads": lambda p: p.setattr(torch, "get_num_threads", lambda: 77),
}


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_other_surroundings_make_another_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not step().taken
    SURROUNDINGS[name](monkeypatch)
    assert not step().taken


def test_another_setting_of_aotautograd_makes_another_step() -> None:
    assert not step().taken
    with torch._functorch.config.patch(activation_memory_budget=0.5):
        assert not step().taken


def test_what_was_not_verified_is_not_taken(tmp_path: Path) -> None:
    step()
    for file in (tmp_path / "graphopt" / "verified").iterdir():
        file.unlink()
    assert not step().taken


def test_another_verification_is_none(tmp_path: Path) -> None:
    step()
    (file,) = (tmp_path / "graphopt" / "steps").iterdir()
    file.write_text(signed(file, {**body(file), "ran": "another"}))
    assert not step().taken


def _line(entry: Any, half: str, index: int, row: Any) -> Any:
    lines = list(entry["engine"][half]["lines"])
    lines[index] = row
    return _half(entry, half, lines=lines)


def _half(entry: Any, half: str, **values: Any) -> Any:
    engine = entry["engine"]
    return {**entry, "engine": {**engine, half: {**engine[half], **values}}}


def _operators(entry: Any, name: str) -> Any:
    count = len(entry["engine"]["forward"]["operators"])
    return _half(entry, "forward", operators=[name] * count)


POISONS: dict[str, Callable[[Any], Any]] = {
    "nothing": lambda e: {},
    "no operator": lambda e: _operators(e, "os.system"),
    "an operator that reads a file": lambda e: _operators(e, "aten.from_file.default"),
    "an operator that resizes": lambda e: _operators(e, "aten.resize_.default"),
    "a value that comes later": lambda e: _line(e, "forward", 0, [0, [{"v": 10**6}]]),
    "an argument of another type": lambda e: _line(e, "forward", 0, [0, ["x", [], {}]]),
    "too many arguments": lambda e: _line(e, "backward", 0, [0, [1] * 40]),
    "a name that is code": lambda e: _line(e, "forward", 0, [0, [], {"a=print('poison'), b": 1}]),
    "a word that is none": lambda e: _line(e, "forward", 0, [0, [{"torch": "load"}]]),
    "results of others": lambda e: _half(e, "forward", returns=[{"v": 0}]),
    "other inputs": lambda e: _half(e, "backward", inputs=1),
    "inputs below zero": lambda e: _half(e, "forward", inputs=-5),
    "a large constant": lambda e: _half(
        e,
        "forward",
        constants=[{"dtype": "float32", "shape": [10**9], "stride": [1], "bytes": ""}],
    ),
    "no plan": lambda e: {**e, "plan": "{}"},
    "another plan": lambda e: {**e, "plan": e["plan"].replace("first.weight", "third.weight")},
    "another backend": lambda e: {**e, "backend": {**e["backend"], "backend": "inductor"}},
    "outputs that there are not": lambda e: {**e, "features": [99]},
    "parameters of no role": lambda e: {**e, "roles": [{"name": "first.weight"}]},
}


@pytest.mark.parametrize("name", POISONS)
def test_what_is_poisoned_is_no_step(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = step()
    (file,) = (tmp_path / "graphopt" / "steps").iterdir()
    file.write_text(signed(file, POISONS[name](body(file))))
    with pytest.warns(RuntimeWarning, match="is damaged and is made anew") as said:
        second = step()
    assert len([w for w in said if "a kept" in str(w.message)]) == 1
    assert second.bits == first.bits
    assert capsys.readouterr().out == ""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert step().taken


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("written")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        step()
    (file,) = (folder / "graphopt" / "steps").iterdir()
    return body(file)


@settings(max_examples=60)
@given(data=st.data())
def test_whatever_is_edited_is_a_step_or_none(written: Any, data: st.DataObject) -> None:
    """It is a miss, or has as many inputs and results as before; nothing is raised."""
    edited = json.loads(json.dumps(written))
    path = data.draw(st.sampled_from(sorted(_places(written), key=str)[1:]))
    junk = st.sampled_from([None, 0, -1, 10**9, 1.5, "", "x", "a.b", [], {}, True, [[]], {"v": 1}])
    at = edited
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = data.draw(junk)
    steps = Steps.of(Pipeline((Cleanup(),)), {}, "eager", "off", Session())
    assert steps is not None
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")
        patch.setattr(type(STORE), "read", lambda *_: store.Found(edited, "digest"))
        found = steps.found("digest")
    if found is not None:
        assert found.plan.signature.inputs
        assert callable(found.engine)


def test_a_job_takes_no_step_over() -> None:
    """One rank that finds a step, and another that measures, would wait for one another."""
    session: Any = type("Session", (), {"ranks": {"dp": object()}})()
    assert Steps.of(Pipeline((Cleanup(),)), {}, "eager", "off", session) is None


def test_code_with_parts_or_checks_is_not_kept(tmp_path: Path) -> None:
    class Checked(Net):
        def forward(self, x: Tensor, mask: Tensor) -> dict[str, Any]:
            if not torch.isfinite(x).all():
                raise ValueError
            return super().forward(x, mask)

    for _ in range(2):
        assert not step(Checked).taken
        assert not step(passes="cleanup,precision").taken
    assert not list((tmp_path / "graphopt").glob("steps/*"))


def test_a_full_folder_is_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, *args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.warns(RuntimeWarning) as said:
        assert not step().taken
    messages = [str(w.message).partition(" (")[0] for w in said]
    told = "captures cannot be kept for later processes: No space left on device"
    assert [m for m in messages if "kept" in m] == [told]
