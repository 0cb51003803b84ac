"""Sessions: whose state is whose, what a trial may leave, what plugins may get wrong."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt import registry
from graphopt.errors import PluginError, StateError
from graphopt.model.controller import controller_of
from graphopt.runtime.session import Session
from tests.support.methods import write_methods

X = torch.randn(4, 3)


@pytest.fixture
def methods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(write_methods(tmp_path / "methods"))


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def _optimized(passes: str, verify: str = "off", model: nn.Module | None = None) -> Any:
    model = model or _model()
    graphopt.optimize(model, passes=passes, backend="eager", verify=verify)  # type: ignore[call-overload]
    return model


def _session(model: nn.Module) -> Session:
    controller = controller_of(model)
    assert controller is not None
    return controller.session


def _step(model: nn.Module) -> None:
    model.zero_grad()
    model(X).sum().backward()


# -- plugins ---------------------------------------------------------------------------------------


def test_a_runtime_part_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_methods(tmp_path, leave_out=[("right", "runtime")])
    monkeypatch.syspath_prepend(folder)
    model = _optimized("right")
    with pytest.raises(PluginError, match="pass 'right' leaves a plan part, and no runtime part"):
        model(X)
    assert type(model) is nn.Sequential
    assert not hasattr(model, "steps_so_far")
    with pytest.raises(PluginError, match="pass 'right' leaves a plan part"):
        graphopt.optimize(model, (X,), passes="right", backend="inductor")


def test_a_plan_part_that_nobody_can_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(write_methods(tmp_path, leave_out=[("right", "plan")]))
    plan = graphopt.optimize(_model(), (X,), passes="right", dry_run=True)
    assert isinstance(plan, graphopt.Plan)
    with pytest.raises(PluginError, match="has a part 'right', and no package that is installed"):
        graphopt.Plan.from_json(plan.to_json())


@pytest.mark.usefixtures("methods")
def test_a_runtime_part_of_another_version() -> None:
    model = _optimized("of_another_version")
    with pytest.raises(PluginError, match="has version 1, and the runtime part that is installed"):
        model(X)
    assert type(model) is nn.Sequential


@pytest.mark.usefixtures("methods")
def test_two_packages_with_parts_of_one_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(write_methods(tmp_path / "again", name="others"))
    for table, what in ((registry.PLAN_PARTS, "plan"), (registry.RUNTIME_PARTS, "runtime")):
        with pytest.raises(PluginError, match=f"two {what} parts have the name 'right'") as caught:
            registry.get("right", table)
        assert "demo-methods 1.3" in caught.value.message
        assert "others 1.3" in caught.value.message


# -- methods of the model --------------------------------------------------------------------------


@pytest.mark.usefixtures("methods")
def test_a_model_gets_the_methods_of_its_parts() -> None:
    model = _optimized("right")
    assert model.steps_so_far() == 0
    for _ in range(3):
        _step(model)
    assert model.steps_so_far(times=2) == 6
    assert "How many steps have ended." in model.steps_so_far.__doc__
    twin = copy.deepcopy(model)
    _step(twin)
    assert (model.steps_so_far(), twin.steps_so_far()) == (3, 4)
    _optimized("cleanup", model=model)
    assert not hasattr(model, "steps_so_far")


class OfTheClass(nn.Linear):
    def steps_so_far(self) -> str:
        return "own"


def _with_attribute() -> nn.Module:
    model = nn.Linear(3, 2)
    model.steps_so_far = lambda: "own"  # type: ignore[assignment]
    return model


class OfASubmodule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.steps_so_far = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.steps_so_far(x)


class OfAParameter(nn.Linear):
    def __init__(self) -> None:
        super().__init__(3, 2)
        self.steps_so_far = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.steps_so_far


@pytest.mark.usefixtures("methods")
@pytest.mark.parametrize(
    "make", [lambda: OfTheClass(3, 2), _with_attribute, OfASubmodule, OfAParameter]
)
def test_the_models_own_attributes_win(make: Any) -> None:
    plain = make()
    kind = type(plain.steps_so_far)
    model = _optimized("right", "eager", make())
    for optimized in (model, copy.deepcopy(model)):
        assert type(optimized.steps_so_far) is kind
        _step(optimized)
        assert type(optimized.steps_so_far) is kind
    # Another model of the class that has no such attribute gets the method.
    if type(plain) is nn.Linear:
        assert _optimized("right", model=nn.Linear(3, 2)).steps_so_far() == 0


@pytest.mark.usefixtures("methods")
def test_two_parts_that_add_different_methods_of_one_name() -> None:
    _optimized("right,is_alone")  # the same method, inherited
    model = _model()
    with pytest.raises(PluginError) as caught:
        _optimized("right,has_other_method", model=model)
    assert caught.value.message == (
        "'right' and 'has_other_method' both add a method 'steps_so_far' to the model"
    )
    assert type(model) is nn.Sequential
    assert controller_of(model) is None
    _step(model)


# -- state -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("methods")
@pytest.mark.parametrize("key", ["nobody/x", "loose", "right/", "cleanup2/steps", "/steps"])
@pytest.mark.parametrize("steps", [0, 2])
def test_a_saved_state_that_nobody_owns(key: str, steps: int) -> None:
    model = _optimized("cleanup,right")
    for _ in range(steps):
        _step(model)
    before = graphopt.state_dict(model)
    with pytest.raises(StateError) as caught:
        graphopt.load_state_dict(model, {"right/steps": torch.full((), 9.0), key: torch.ones(1)})
    assert caught.value.message.startswith(f"the saved state has {key!r}, and no pass of this")
    assert graphopt.state_dict(model) == before
    assert model.steps_so_far() == steps


@pytest.mark.usefixtures("methods")
def test_a_state_of_another_form_is_refused_and_nothing_is_loaded() -> None:
    model = _optimized("right,kfac{interval=1}")
    for _ in range(2):
        _step(model)
    saved = graphopt.state_dict(model)
    wrong = {**saved, "right/steps": torch.full((), 9.0), "kfac/now/0.weight:A": torch.ones(1)}
    with pytest.raises(StateError, match=r"'kfac/now/0.weight:A' has shape \(1,\) in the"):
        graphopt.load_state_dict(model, wrong)
    assert model.steps_so_far() == 2
    # A copy knows as much about its state as the original.
    twin = copy.deepcopy(model)
    with pytest.raises(StateError, match=r"'kfac/now/0.weight:A' has shape \(1,\) in the"):
        graphopt.load_state_dict(twin, wrong)
    graphopt.load_state_dict(twin, saved)
    assert twin.steps_so_far() == 2


@pytest.mark.usefixtures("methods")
def test_a_copy_shares_nothing() -> None:
    model = _optimized("right")
    with model.no_sync():
        _step(model)
        twin = copy.deepcopy(model)
    assert (_session(twin).pending, _session(twin).synchronise) == (True, True)
    _step(model)
    _step(model)
    assert (model.steps_so_far(), twin.steps_so_far()) == (2, 0)
    assert _session(twin).part("right").state is _session(twin).state("right")


# -- trials ----------------------------------------------------------------------------------------


def test_a_trial_restores_all_that_a_part_can_do_to_its_state() -> None:
    session = Session(["a", "b"])
    state = session.state("a")
    state |= {"kept": torch.ones(2), "nan": torch.full((2,), torch.nan), "gone": torch.ones(1)}
    before = {name: value.clone() for name, value in state.items()}
    objects = dict(state)
    session.pending = True
    with session.trial():
        assert (session.synchronise, session.pending) == (False, True)
        state["kept"] += 1
        state["nan"] = torch.zeros(2)
        del state["gone"]
        session.state("b")["new"] = torch.ones(1)
        session.pending = False
    assert (session.synchronise, session.pending) == (True, True)
    assert session.state("a") is state
    assert {name: id(value) for name, value in state.items()} == {
        name: id(value) for name, value in objects.items()
    }
    for name, value in before.items():
        torch.testing.assert_close(state[name], value, equal_nan=True)
    assert session.state("b") == {}


def test_no_sync_nests_and_survives_errors() -> None:
    session = Session()
    with session.no_sync():
        with pytest.raises(ZeroDivisionError), session.no_sync():
            raise ZeroDivisionError
        assert not session.synchronise
    assert session.synchronise


def test_only_accumulated_gradients_are_taken() -> None:
    session, weight = Session(), nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    assert session.take({"w": weight}, ["w"]) == {}
    assert weight.grad is not None
    session.pending = True
    assert list(session.take({"w": weight}, ["w"])) == ["w"]
    assert weight.grad is None
    assert session.take({"w": weight}, ["w"]) == {}


# -- who changes state, and when -------------------------------------------------------------------

SENTENCE = (
    "the runtime part of 'changes_in_forward' changed its state 'changes_in_forward/calls' outside "
    "of `finish`"
)


@pytest.mark.usefixtures("methods")
def test_full_verification_finds_a_part_that_changes_state_outside_of_finish() -> None:
    model = _optimized("changes_in_forward", "full")
    with pytest.raises(StateError) as caught:
        model(X)
    assert caught.value.message == SENTENCE
    assert type(model) is nn.Sequential
    _step(_optimized("changes_in_forward", "eager"))
    _step(_optimized("right,kfac", "full"))


@pytest.mark.usefixtures("methods")
def test_a_watched_step_names_the_owner_of_what_changed() -> None:
    model = _optimized("changes_in_forward")
    model(X)
    with pytest.raises(StateError) as caught, _session(model).watch():
        _step(model)
    assert caught.value.message == SENTENCE
    # In `finish` a part may change its own state, and nobody else's.
    with pytest.raises(StateError, match="the runtime part of 'right' changed its state"):
        _step(_optimized("right,changes_another", "full"))
    _step(model)  # nobody looks any more


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.update(new=torch.ones(1)),
        lambda state: state.pop("old"),
        lambda state: state["old"].add_(1),
        lambda state: state.update(old=torch.ones(2)),
        lambda state: state.update(old=torch.ones(1, dtype=torch.float64)),
    ],
)
def test_every_change_is_seen(change: Any) -> None:
    session = Session(["a"])
    session.state("a")["old"] = torch.ones(1)
    session.state("a")["nan"] = torch.full((1,), torch.nan)
    with session.watch():
        pass
    with pytest.raises(StateError, match="the runtime part of 'a' changed"), session.watch():
        change(session.state("a"))
