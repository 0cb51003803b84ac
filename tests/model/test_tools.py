"""Tools on an optimized model: they work as on the plain one, or one sentence says why not."""

from __future__ import annotations

import copy
import io
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

import graphopt
from graphopt.errors import ArgumentError

X = torch.randn(3, 4)


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


def _optimized(model: nn.Module | None = None) -> Any:
    return graphopt.optimize(model or _net(), backend="eager", cache="off")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_traced_by_jit() -> None:
    model = _optimized()
    assert torch.equal(torch.jit.trace(model, X)(X), model(X))


def test_traced_by_fx() -> None:
    traced = fx.symbolic_trace(_optimized())
    assert [node.target for node in traced.graph.nodes] == ["input", "0", "1", "2", "output"]
    assert torch.equal(traced(X), _net()(X))


def test_exported() -> None:
    assert torch.equal(torch.export.export(_optimized(), (X,)).module()(X), _net()(X))


def test_exported_strictly_without_a_word() -> None:
    model = _optimized()
    model(X)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="torch.compile")
        exported = torch.export.export(model, (X,), strict=True)
    assert torch.equal(exported.module()(X), _net()(X))
    assert list(exported.state_dict) == list(_net().state_dict())
    assert "torch.compile" not in model.explain()


@pytest.mark.filterwarnings("ignore")
def test_exported_to_onnx() -> None:
    pytest.importorskip("onnxscript")
    model = _optimized()
    model(X)
    program = torch.onnx.export(model, (X,), dynamo=True, verbose=False)
    assert [node.op_type for node in program.model_proto.graph.node] == ["Gemm", "Relu", "Gemm"]
    assert {w.name for w in program.model_proto.graph.initializer} == set(_net().state_dict())


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_script_is_refused(inside: bool) -> None:
    model = _optimized()
    model(X)
    outer = nn.Sequential(model, nn.ReLU()) if inside else model
    said = (
        r"torch.jit.script compiles the source of forward.*\n.*torch.export.export\(model, inputs\)"
    )
    with pytest.raises(ArgumentError, match=said):
        torch.jit.script(outer)
    assert outer[0] is model or not inside
    assert "verified" in model.explain()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_draws_the_modules(tmp_path: Path) -> None:
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = []
    for model in (_net(), _optimized()):
        model(X)
        folder = str(tmp_path / type(vars(model).get("explain")).__name__)
        with tensorboard.SummaryWriter(folder) as writer:
            writer.add_graph(model, X)
        read = EventAccumulator(folder)
        read.Reload()
        found.append([node.name for node in read.Graph().node])
    assert found[0] == found[1]
    assert any("Linear[2]" in name for name in found[0])


def test_a_profile_names_the_step() -> None:
    model = _optimized()
    loss = model(X).sum()
    assert "GraphoptStep" in str(loss.grad_fn.next_functions[0][0])
    with torch.profiler.profile(with_modules=True) as profile:
        model(X).sum().backward()
    names = {event.key for event in profile.key_averages()}
    assert {"_GraphoptStep", "_GraphoptStepBackward", "aten::addmm", "aten::mm"} <= names


def test_metrics_inside_and_around() -> None:
    torchmetrics = pytest.importorskip("torchmetrics")

    class Measured(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = _net()
            self.right = torchmetrics.Accuracy(task="multiclass", num_classes=2)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            scores = self.net(x)
            self.right(scores, y)
            return scores

    y, found = torch.tensor([0, 1, 1]), []
    for model in (Measured(), _optimized(Measured())):
        around = torchmetrics.MeanMetric()
        for wanted in (y, 1 - y, y):
            scores = model(X, wanted)
            loss = nn.functional.cross_entropy(scores, wanted)
            around.update(loss)
            loss.backward()
        results = around.compute(), model.right.compute(), model.net[0].weight.grad
        found.append((*results, torch.tensor(model.right._update_count)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert "verified" in model.explain()


def test_a_copy_on_the_meta_device() -> None:
    model = _optimized()
    model(X)
    assert copy.deepcopy(model).to("meta")(X.to("meta")).shape == (3, 2)
    with torch.device("meta"):
        empty = _net()
    with pytest.raises(ArgumentError, match="on the meta device and has no values"):
        _optimized(empty)


@pytest.mark.parametrize("in_place", [False, True])
def test_torch_compile_around_it_is_said(in_place: bool) -> None:
    model = _optimized()
    if in_place:
        model.compile(backend="aot_eager")
    compiled = model if in_place else torch.compile(model, backend="aot_eager")
    with pytest.warns(UserWarning, match="torch.compile reads this model's own forward"):
        compiled(X)
    assert "torch.compile reads this model's own forward" in model.explain()
    with pytest.raises(ArgumentError, match="this model is wrapped by torch"):
        _optimized(torch.compile(_net(), backend="eager"))


def _flops(model: nn.Module) -> dict[str, int]:
    with FlopCounterMode(display=False) as counter:
        model(X).sum().backward()
    found = counter.get_flop_counts()
    return {name: sum(counts.values()) for name, counts in found.items()}


def test_flops_are_counted_by_module_before_and_after_a_capture() -> None:
    expected, model = _flops(_net()), _optimized()
    assert _flops(model) == expected
    model(X)
    assert _flops(model) == expected
    assert "verified" in model.explain()


def _summary(model: nn.Module) -> list[tuple[str, int]]:
    """What summaries do: hooks that look at each layer's call, and are taken off again."""
    found: list[tuple[str, int]] = []

    def hook(module: nn.Module, args: Any, output: Tensor) -> None:
        rows = {type(module).__name__: sum(p.numel() for p in module.parameters())}
        torch.save(rows, io.BytesIO())  # Dynamo does not follow it
        found.extend(rows.items())

    handles = [m.register_forward_hook(hook) for m in model.modules() if not any(m.children())]
    with torch.no_grad():
        model(X)
    for handle in handles:
        handle.remove()
    return found


def test_a_summary_sees_each_layer_once() -> None:
    model, expected = _optimized(), _summary(_net())
    with pytest.warns(UserWarning, match="3 forward hooks that were hung on the model after"):
        assert _summary(model) == expected
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        model(X)  # and the same call without them is captured
    assert "verified" in model.explain()


def test_torchinfo_does_not_double_parameters() -> None:
    torchinfo = pytest.importorskip("torchinfo")
    expected = torchinfo.summary(_net(), input_data=X, verbose=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        actual = torchinfo.summary(_optimized(), input_data=X, verbose=0)
    assert actual.total_params == expected.total_params
    assert actual.total_mult_adds == expected.total_mult_adds


def test_hooks_that_can_be_captured_run_once_per_call() -> None:
    model, calls = _optimized(), []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    for _ in range(2):
        model(X)
    assert len(calls) == 2


def test_pickled_as_the_plain_model_with_its_names() -> None:
    model = _optimized()
    model(X)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert list(loaded.state_dict()) == list(_net().state_dict())
    assert torch.equal(loaded(X), model(X))
