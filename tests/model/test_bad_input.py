"""Every bad input gets one clear sentence, a place, and a hint; the model stays as it was."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.errors import ArgumentError, CaptureError, MismatchError, PipelineError, SpecError


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.lin(x)
        if h.sum() > 0:  # the line that must be named
            return h
        return -h


def _assert_untouched(model: nn.Module, before: dict[str, Tensor], cls: type) -> None:
    assert type(model) is cls
    after = model.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_non_tensor_input_that_changes_specialises_and_stays_right() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(4, 4)

        def forward(self, x: Tensor, times: int) -> Tensor:
            for _ in range(times):
                x = self.lin(x)
            return x

    model = Model()
    plain = copy.deepcopy(model)
    graphopt.optimize(model, backend="eager")
    x = torch.randn(2, 4)
    for times in (1, 2, 3, 1):
        assert torch.equal(model(x, times), plain(x, times))
    assert model.explain().count("specialisation") >= 3


def test_model_on_meta() -> None:
    with torch.device("meta"):
        model = nn.Linear(2, 2)
    with pytest.raises(ArgumentError, match=r"'weight' is on the meta device.*") as caught:
        graphopt.optimize(model)
    assert "to_empty" in str(caught.value)
    assert type(model) is nn.Linear


def test_one_layer_on_meta_is_named() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    graphopt.model.arguments.check_model(model)
    model[1] = model[1].to("meta")
    with pytest.raises(ArgumentError, match=r"'1\.weight' is on the meta device"):
        graphopt.optimize(model)


def test_parameters_on_two_devices_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Elsewhere(nn.Parameter):
        @property
        def device(self) -> torch.device:  # type: ignore[override]
            return torch.device("cuda:0")

    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    monkeypatch.setitem(
        model[1]._parameters, "weight", torch.Tensor._make_subclass(Elsewhere, torch.ones(2, 2))
    )
    with pytest.raises(ArgumentError, match=r"2 devices: .*on cpu.*'1.weight' on cuda:0"):
        graphopt.optimize(model)


def test_model_without_parameters() -> None:
    with pytest.raises(ArgumentError, match="ReLU has no parameters"):
        graphopt.optimize(nn.ReLU())


def test_not_a_module() -> None:
    with pytest.raises(ArgumentError, match="got a function"):
        graphopt.optimize(lambda x: x)  # type: ignore[type-var]


def test_a_forward_of_the_instance() -> None:
    model = graphopt.optimize(nn.Linear(2, 2), backend="eager")
    model.forward = lambda x: x  # type: ignore[method-assign]
    with pytest.raises(ArgumentError, match="on the instance"):
        graphopt.optimize(model)


def test_unknown_pass_and_option() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(SpecError, match="cleanup") as caught:
        graphopt.optimize(model, passes="cleanpu")
    assert "^" in str(caught.value)
    with pytest.raises(SpecError, match="colour"):
        graphopt.optimize(model, passes="cleanup{colour=3}")
    with pytest.raises(ArgumentError, match="instance of each pass"):
        graphopt.optimize(model, passes=["cleanup"])  # type: ignore[list-item]
    assert type(model) is nn.Linear


def test_passes_in_an_impossible_order() -> None:
    from tests.support.demo_passes import UsesFactors

    with pytest.raises(PipelineError, match=UsesFactors.name):
        graphopt.optimize(nn.Linear(2, 2), passes=[UsesFactors()])


@pytest.mark.parametrize(
    ("argument", "value"), [("backend", "tpu"), ("verify", "maybe"), ("mesh", "dp=zero")]
)
def test_other_arguments(argument: str, value: str) -> None:
    with pytest.raises(ArgumentError, match=value.split("=")[-1]):
        graphopt.optimize(nn.Linear(2, 2), **{argument: value})  # type: ignore[arg-type]


def test_dry_run_needs_inputs() -> None:
    with pytest.raises(ArgumentError, match="example_inputs"):
        graphopt.optimize(nn.Linear(2, 2), dry_run=True)


def test_wrong_example_inputs() -> None:
    with pytest.raises(ArgumentError, match="is a str"):
        graphopt.optimize(nn.Linear(2, 2), "x")


def test_missing_toolchain_falls_back_and_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    from torch._inductor import config

    with config.patch({"cpp.cxx": (None, "g++")}):
        for backend in ("inductor", "auto"):
            model = graphopt.optimize(nn.Linear(2, 2), backend=backend, passes="")
            assert model(torch.ones(1, 2)).shape == (1, 2)
            assert "C++ compiler" in model.explain()
            assert "eager" in model.explain()


def test_mismatch_with_eager_is_refused_and_names_the_gradient(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A capture that computes something else must not run: break one on purpose."""
    import graphopt.compiler.making

    honest = graphopt.compiler.making.capture

    def broken(*args: object, **kwargs: object) -> object:
        captured = honest(*args, **kwargs)  # type: ignore[arg-type]
        graph = captured.graph
        grad = graph.gradient("weight")
        with graph.fx.inserting_before(graph.output):
            wrong = graph.fx.call_function(torch.ops.aten.mul.Tensor, (grad, 1.01))
        wrong.meta.update(grad.meta)
        graph.output.replace_input_with(grad, wrong)
        graph.changed()
        return captured

    monkeypatch.setattr(graphopt.compiler.making, "capture", broken)
    model = nn.Linear(2, 2)
    before = copy.deepcopy(model.state_dict())
    graphopt.optimize(model, backend="eager")
    with pytest.raises(MismatchError, match="gradient of weight"):
        model(torch.ones(3, 2))
    _assert_untouched(model, before, nn.Linear)


def test_failure_of_a_later_specialisation_keeps_the_model_optimized() -> None:
    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = self.lin(x)
            return h if len(x) < 3 or h.sum() > 0 else -h

    model = graphopt.optimize(Sometimes(), backend="eager", passes="", fallback="error")
    model(torch.ones(2, 4))
    with pytest.raises(CaptureError):
        model(torch.ones(5, 4))
    assert type(model) is Sometimes
    assert model(torch.ones(2, 4)).shape == (2, 4)
    assert model.explain().count("specialisation") == 1


def test_loading_state_into_a_plain_model() -> None:
    with pytest.raises(graphopt.errors.StateError, match="not optimized"):
        graphopt.load_state_dict(nn.Linear(2, 2), {})
