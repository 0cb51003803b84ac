"""An error in a call is that call's: the model stays optimized, with captures and state."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import graphopt
import graphopt.compiler.making
import graphopt.model.surface
from graphopt.errors import CaptureError, RankError, StateError
from graphopt.model.controller import controller_of
from tests.support.ranks import on_ranks


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 2)
        self.bn = nn.BatchNorm1d(2)

    def forward(self, x: Tensor) -> Tensor:
        assert len(x) < 10, "batch too large"
        return self.bn(self.lin(x))


X = torch.randn(3, 4)
BAD = {
    "shape": torch.randn(3, 5),
    "dtype": torch.randn(3, 4).double(),
    "type": "text",
    "assertion": torch.randn(20, 4),
    "value": torch.randn(1, 4),
}


def _model(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    return graphopt.optimize(Net(), backend="eager", **options)


@pytest.mark.parametrize("first", [True, False], ids=["first call", "later"])
@pytest.mark.parametrize("kind", BAD)
def test_a_call_that_eager_refuses_raises_what_eager_raises(kind: str, first: bool) -> None:
    model = _model(passes="cleanup,kfac{damping=0.01}")
    if not first:
        model(X).sum().backward()
    plain = copy.deepcopy(model)
    graphopt.model.surface.restore(plain)
    state = graphopt.state_dict(model)
    made = controller_of(model).made
    with pytest.raises(Exception) as expected:  # noqa: PT011
        plain(BAD[kind])
    with pytest.raises(type(expected.value)) as caught:
        model(BAD[kind])
    assert str(caught.value) == str(expected.value)
    assert controller_of(model).made == made
    after = graphopt.state_dict(model)
    assert state.keys() == after.keys()
    assert all(torch.equal(state[k], after[k]) for k in state)
    # What eager leaves behind before it raises, and nothing else.
    left = plain.state_dict()
    assert all(torch.equal(v, left[k]) for k, v in model.state_dict().items())
    model(X).sum().backward()
    assert len(graphopt.state_dict(model)) > 0
    assert controller_of(model).made == 1


@pytest.mark.parametrize("broken", [None, {5: torch.ones(1)}, "one value"])
def test_a_state_that_is_none_changes_nothing(broken: Any) -> None:
    model = _model(passes="cleanup,kfac{damping=0.01}")
    model(X).sum().backward()
    good = graphopt.state_dict(model)
    if broken == "one value":
        broken = {**good, sorted(good)[1]: 1.0}
    with pytest.raises(StateError, match="the saved state"):
        graphopt.load_state_dict(model, broken)
    after = graphopt.state_dict(model)
    assert all(torch.equal(good[k], after[k]) for k in good)
    bad = {k: v * float("nan") if "inverse" in k else v for k, v in good.items()}
    with pytest.raises(StateError, match="is not finite in the saved state"):
        graphopt.load_state_dict(model, bad)


def test_an_interrupt_in_a_capture_is_that_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _model(passes="cleanup")
    model(X)

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(graphopt.compiler.making, "capture", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model(torch.randn(5, 4))
    assert controller_of(model).made == 1
    model(torch.randn(5, 4))
    assert controller_of(model).made == 2


def test_a_failure_inside_of_graphopt_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise AttributeError("'int' object has no attribute 'view'")

    monkeypatch.setattr(graphopt.compiler.making, "capture", broken)
    with pytest.raises(CaptureError, match="cannot be captured: AttributeError: 'int'") as caught:
        _model()(X)
    assert "test_errors.py" in caught.value.where
    assert isinstance(caught.value.__cause__, AttributeError)


def test_example_inputs_that_fail_give_the_model_back() -> None:
    model = Net()
    with pytest.raises(graphopt.GraphoptError):
        graphopt.optimize(model, (torch.randn(20, 4),), backend="eager")
    assert controller_of(model) is None
    assert "forward" not in model.__dict__
    assert not hasattr(model, "explain")


def test_a_rank_error_of_a_pass_keeps_its_type() -> None:
    from graphopt.passbase import Outcome
    from graphopt.pipeline import Pipeline
    from tests.pipeline.test_pipeline import does, linear_graph

    def silent(_: object) -> Outcome:
        raise RankError("rank 1 does not answer")

    with pytest.raises(RankError, match=r"^\[GO-D01\] rank 1 does not answer"):
        Pipeline((does(silent),)).run(linear_graph())


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.conv(x).relu()
        return self.head(h), h


def test_gradients_through_intermediate_outputs_are_right() -> None:
    model = graphopt.optimize(Two(), backend="eager")
    plain = copy.deepcopy(model)
    graphopt.model.surface.restore(plain)
    for m in (model, plain):  # what is asked of them together is right
        y, h = m(X)
        (y.sum() + h.square().sum()).backward()
    pairs = zip(model.parameters(), plain.parameters(), strict=True)
    assert all(torch.equal(a.grad, b.grad) for a, b in pairs)
    assert "tensor 1 is an intermediate value" in model.explain()
    y, h = model(X)
    y.retain_grad()  # nothing is computed from this one
    y.sum().backward()
    assert torch.equal(y.grad, torch.ones_like(y))


class Spread(nn.Module):
    """Returns its mean inside of a distribution, where it is an intermediate value."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> torch.distributions.Normal:
        return torch.distributions.Normal(self.lin(x), torch.ones(2))


def test_a_value_that_comes_out_twice_is_no_hook_of_the_user() -> None:
    gradients = []
    for optimized in (False, True):
        torch.manual_seed(0)
        model = graphopt.optimize(Spread(), backend="eager") if optimized else Spread()
        spread = model(X)
        spread.mean.square().sum().backward()
        gradients.append(model.lin.weight.grad)
    assert torch.equal(*gradients)


def _bad_batch(rank: int) -> None:
    torch.manual_seed(0)
    model = graphopt.optimize(nn.Linear(4, 2), backend="eager")
    for step in range(4):
        x = torch.full((2, 5 if step == 1 else 4), float(rank + step))
        model.zero_grad()
        try:
            model(x).sum().backward()
        except RuntimeError:
            assert step == 1
            continue
        gradients = [torch.zeros(2, 4) for _ in range(2)]
        dist.all_gather(gradients, model.weight.grad)
        assert torch.equal(*gradients), "the gradients are not reduced any more"


@pytest.mark.distributed
def test_gradients_stay_reduced_after_a_bad_batch(tmp_path: Path) -> None:
    on_ranks(tmp_path, 2, _bad_batch)


@pytest.mark.parametrize(
    ("layer", "given", "said"),
    [
        (nn.Linear(3, 3), torch.ones(2, 4), "a and b must have same reduction dim, but got [2, 4]"),
        (nn.Embedding(3, 3), torch.ones(2), "Expected tensor for argument #1 'indices' to have"),
        (nn.Conv2d(3, 3, 3), torch.ones(2, 4), "Expected 3D (unbatched) or 4D (batched) input"),
    ],
    ids=["linear", "embedding", "convolution"],
)
def test_an_operator_that_refuses_its_inputs_says_why(
    layer: nn.Module, given: Tensor, said: str
) -> None:
    with pytest.raises(CaptureError) as caught:
        graphopt.optimize(layer, (given,), backend="eager")
    assert caught.value.message.startswith(
        f"an operator of forward refuses what it is given: {said}"
    )
    assert caught.value.hint.startswith("look at the shapes and dtypes of the inputs")
