"""Runtime parts: how they nest, what a step tells them, what becomes of the gradients."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.errors import PluginError, StateError
from graphopt.model.controller import controller_of
from graphopt.runtime.engine.step import Step
from graphopt.runtime.part import check_like
from graphopt.runtime.session import Session
from tests.support.methods import EVENTS, METHODS, STEPS, write_methods

X = torch.randn(4, 3)


@pytest.fixture(autouse=True)
def _methods(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(write_methods(tmp_path))
    EVENTS.clear()
    STEPS.clear()


def _optimized(passes: str, model: nn.Module | None = None, verify: str = "off") -> nn.Module:
    torch.manual_seed(0)
    model = model or nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    graphopt.optimize(model, passes=passes, backend="eager", verify=verify)  # type: ignore[call-overload]
    return model


def _session(model: nn.Module) -> Session:
    controller = controller_of(model)
    assert controller is not None
    return controller.session


def test_the_first_pass_is_outermost_and_finishes_last() -> None:
    model = _optimized("records,cleanup,records_too")
    y = model(X).sum()
    around = [("records", "%s begins"), ("records_too", "%s begins")]
    around += [("records_too", "%s ends"), ("records", "%s ends")]

    def nested(what: str) -> list[tuple[str, str]]:
        return [(name, text % what) for name, text in around]

    step, forward = nested("step"), nested("forward")
    assert [*step[:2], *forward, *step[2:]] == EVENTS
    EVENTS.clear()
    y.backward()
    assert [*nested("backward"), ("records_too", "finish"), ("records", "finish")] == EVENTS


def test_what_a_step_tells() -> None:
    model = _optimized("records")
    session = _session(model)
    with session.no_sync():
        early = model(X)
    last = model(torch.cat([X, X]))
    # The forward decides; which backward runs first does not matter.
    early.sum().backward()
    (step, gradients), *_ = STEPS
    assert (step.ends, step.examples, step.scale) == (False, 4, 1.0)
    assert step.parameters == dict(model.named_parameters())
    assert gradients.keys() == step.parameters.keys()
    before = {n: p.grad.clone() for n, p in model.named_parameters()}  # type: ignore[union-attr]
    last.sum().backward()
    step, gradients = STEPS[1]
    assert (step.ends, step.examples) == (True, 8)
    for name, parameter in model.named_parameters():
        # Over all micro-batches, and handed to autograd as a whole.
        torch.testing.assert_close(gradients[name], 3 * before[name])
        torch.testing.assert_close(parameter.grad, gradients[name])


def test_forwards_in_flight_have_a_step_each() -> None:
    model = _optimized("records")
    first, second = model(X), model(X)
    second.sum().backward()
    first.sum().backward(retain_graph=True)
    first.sum().backward()
    steps = [step for step, _ in STEPS]
    assert steps[0] is not steps[1]
    assert steps[1] is steps[2]


def test_gradients_are_replaced_and_left_out() -> None:
    plain = _optimized("cleanup")
    model = _optimized("drops,right")
    for _ in range(2):
        for m in (model, plain):
            m.zero_grad()
            m(X).sum().backward()
    first, *others = zip(model.named_parameters(), plain.parameters(), strict=True)
    assert min(dict(model.named_parameters())) == first[0][0].replace("weight", "bias")
    for (name, one), other in [first, *others]:
        if name == "0.bias":
            assert one.grad is None
        else:
            assert one.grad is not None
            assert other.grad is not None
            assert torch.equal(one.grad, other.grad / 2), name


def test_an_accumulated_gradient_that_no_later_micro_batch_has() -> None:
    class TwoHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(3, 1), nn.Linear(3, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.one(x), self.two(x)

    model = _optimized("right", TwoHeads())
    right = _session(model).part("right")
    right.state["steps"] = torch.ones(())  # so that the next step divides by two
    with model.no_sync():  # type: ignore[operator]
        model(X)[0].sum().backward()
    model(X)[1].sum().backward()
    for name in ("one.weight", "two.weight"):
        torch.testing.assert_close(model.get_parameter(name).grad, X.sum(0, keepdim=True) / 2)


def test_a_part_that_does_not_finish_is_not_asked() -> None:
    model = _optimized("never_finishes")
    with model.no_sync():  # type: ignore[operator]
        model(X).sum().backward()
    assert _session(model).pending
    model(X).sum().backward()
    assert not _session(model).pending


def test_two_parameters_that_share_a_gradient() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.a + self.b

    model = _optimized("right", Sum())
    for _ in range(2):
        model.zero_grad()
        tangent = torch.ones(4, 3)
        model(X).backward(tangent)
    assert torch.equal(model.a.grad, torch.full((3,), 2.0))  # type: ignore[arg-type, union-attr]
    assert torch.equal(model.b.grad, torch.full((3,), 2.0))  # type: ignore[arg-type, union-attr]
    assert torch.equal(tangent, torch.ones(4, 3))


def test_saving_and_reporting_by_default() -> None:
    right = METHODS["right"]["runtime"](Session(["right"]))
    state = {"steps": torch.full((), 3.0)}
    right.accepts([METHODS["right"]["plan"]()], state)
    right.load(state)
    assert right.state == state
    assert right.gather() == right.state
    assert right.gather() is not right.state
    assert right.notes() == ()
    right.settle()
    other = right.copy(Session(["right"]))
    assert type(other) is type(right)
    assert other.state == {}


@pytest.mark.parametrize(
    ("saved", "sentence"),
    [
        ({}, "the saved state lacks 'demo/a'"),
        ({"a": torch.ones(2), "b": torch.ones(1)}, "has 'demo/b' too many"),
        ({"a": torch.ones(3)}, r"'demo/a' has shape \(3,\) in the saved state and \(2,\) here"),
    ],
)
def test_a_saved_state_of_another_form(saved: dict[str, Tensor], sentence: str) -> None:
    own = {"a": torch.zeros(2)}
    with pytest.raises(StateError, match=sentence):
        check_like("demo", own, saved)
    check_like("demo", {}, saved)
    check_like("demo", own, {"a": torch.ones(2)})


_TOO_FEW = [
    ("forward", "results", r"returned \d results from its forward, and the step needs \d"),
    ("backward", "results", r"returned 3 results from its backward, and the step needs 4"),
    ("engine", "results", r"returned 0 results from its engine, and the step needs 1"),
    ("backward", "all", "returned a NoneType from its backward, and the step needs 4"),
    ("forward", "returns", "`returns` of the forward of the runtime part of .* lacks output '0'"),
    ("backward", "returns", "`returns` of the backward .* lacks grad"),
    ("forward", "maker", r"forward\(\) of the runtime part of .* returned a NoneType"),
]


@pytest.mark.parametrize(("hook", "what", "sentence"), _TOO_FEW)
@pytest.mark.parametrize("verify", ["off", "eager"])
def test_a_part_that_returns_too_little_is_named(
    hook: str, what: str, sentence: str, verify: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = METHODS["returns_too_few"]["runtime"]
    monkeypatch.setattr(kind, "hook", hook)
    monkeypatch.setattr(kind, "what", what)
    model = _optimized("records,returns_too_few,cleanup", verify=verify)
    with pytest.raises(PluginError, match=sentence) as caught:
        model(X).sum().backward()
    assert "'returns_too_few'" in caught.value.message


def test_an_inference_call_leaves_parts_alone() -> None:
    model = _optimized("records")
    with torch.no_grad():
        model(X)
    copy.deepcopy(model)
    assert EVENTS == []
    assert Step().ends
