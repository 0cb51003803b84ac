"""What the ranges of a calibration rule out, with the number that does; calibrations of others."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

import graphopt
from graphopt.analysis import gradient_order
from graphopt.analysis.accuracy import layer_errors
from graphopt.capture import capture
from graphopt.errors import ArgumentError, GraphoptError
from graphopt.graph import Graph
from graphopt.passbase import Declined, Outcome, PassContext
from graphopt.passes.precision import Precision
from graphopt.passes.precision.calibrated import HEADROOM, UNDERFLOW, vanishing
from graphopt.passes.precision.formats import FORMATS
from graphopt.pipeline import Pipeline
from graphopt.testing.corpus import CORPUS
from tests.precision.test_pass import QUICK

FP16 = FORMATS["fp16"]


@pytest.fixture(autouse=True)
def _pays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gradient_order.ASSUMED, "cpu", QUICK)


class Scaled(nn.Module):
    """Three layers, of which one reads large and one small values."""

    def __init__(self, large: float = 1.0, small: float = 1.0) -> None:
        super().__init__()
        self.one, self.two, self.three = (nn.Linear(16, 16) for _ in range(3))
        self.large, self.small = large, small

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.one(x) + self.two(x * self.large) + self.three(x * self.small)
        return y


def _outcome(
    model: nn.Module, x: Tensor, folder: Path, batches: object = None, **options: Any
) -> tuple[Graph, Outcome]:
    file = folder / "calibration.json"
    graphopt.calibrate(model, x if batches is None else batches).save(file)
    return _with(model, x, file, **options)


def _with(model: nn.Module, x: Tensor, file: Path, **options: Any) -> tuple[Graph, Outcome]:
    graph = capture(model, (x,)).graph
    Pipeline.parse("cleanup").run(graph)
    pass_ = Precision(cost="roofline", calibration=str(file), **options)
    return graph, pass_.apply(graph, PassContext())


def _by_reason(outcome: Outcome) -> dict[str, list[Declined]]:
    found: dict[str, list[Declined]] = {}
    for declined in outcome.declined:
        found.setdefault(declined.reason, []).append(declined)
    return found


def test_ordinary_values_rule_nothing_out(tmp_path: Path) -> None:
    for format in ("bf16", "fp16"):
        torch.manual_seed(0)
        _, outcome = _outcome(Scaled(), torch.randn(8, 16), tmp_path, format=format)
        assert not _by_reason(outcome).keys() & {"out-of-range", "underflow", "not-finite"}
        assert outcome.changed


def test_large_values_do_not_fit_float16(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 16)
    _, outcome = _outcome(Scaled(large=1e5), x, tmp_path, format="fp16")
    refused = _by_reason(outcome)["out-of-range"]
    assert any(d.site == "addmm_1" for d in refused)
    for declined in refused:
        assert declined.numbers["amax"] > declined.numbers["limit"]
        assert declined.numbers["limit"] == pytest.approx(65504 / HEADROOM)
        assert "fp16 is used up to" in declined.detail
    rows = {r["site"]: r for r in outcome.tables["operators"]}
    assert rows["addmm"]["format"] == "fp16"
    assert (rows["addmm_1"]["format"], rows["addmm_1"]["reason"]) == ("float32", "out-of-range")
    _, wide = _outcome(Scaled(large=1e5), x, tmp_path, format="bf16")
    assert "out-of-range" not in _by_reason(wide)


def test_small_values_vanish_in_float16(tmp_path: Path) -> None:
    torch.manual_seed(0)
    _, outcome = _outcome(Scaled(small=1e-9), torch.randn(8, 16), tmp_path, format="fp16")
    refused = _by_reason(outcome)["underflow"]
    assert any(d.site == "addmm_2" for d in refused)
    for declined in refused:
        assert UNDERFLOW < declined.numbers["underflow"] <= 1
    assert "addmm" not in {d.site for d in refused}


def test_gradients_are_judged_as_loss_scaling_makes_them(tmp_path: Path) -> None:
    """Gradients of a loss that is a mean over many are small, and are scaled before."""
    torch.manual_seed(0)
    model, x = Scaled(), torch.randn(64, 16)

    def tiny(output: Tensor, target: object) -> Tensor:
        return output.square().mean() * 1e-6

    file = tmp_path / "c.json"
    found = graphopt.calibrate(model, [(x, 0)], tiny)
    backward = found.tensors["tangent_0"]
    assert vanishing(backward, FP16) > 0.9
    assert vanishing(backward, FP16, 16) < UNDERFLOW
    found.save(file)
    _, outcome = _with(model, x, file, format="fp16")
    assert "underflow" not in _by_reason(outcome)


def test_vanishing_is_what_a_cast_makes_zero() -> None:
    from graphopt.calibration.ranges import RangeCounter

    values = 2.0 ** torch.linspace(-32, 2, 5000)
    counter = RangeCounter()
    counter.add(values)
    zero = values.half() == 0
    expected = float(values[zero].sum() / values.sum())
    assert vanishing(counter.found(), FP16) == pytest.approx(expected, rel=0.5)
    assert vanishing(counter.found(), FORMATS["bf16"]) == 0


def test_nan_is_ruled_out(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 16)
    bad = x.clone()
    bad[0, 0] = math.nan
    with pytest.warns(UserWarning, match="NaN"):
        _, outcome = _outcome(Scaled(), x, tmp_path, [x, bad])
    refused = _by_reason(outcome)["not-finite"]
    assert refused[0].numbers["nan"] >= 1
    assert not outcome.changed


# -- calibrations of others ------------------------------------------------------------------------


def test_a_calibration_of_another_model(tmp_path: Path) -> None:
    file = tmp_path / "other.json"
    graphopt.calibrate(nn.Linear(16, 4), torch.randn(2, 16)).save(file)
    with pytest.raises(ArgumentError, match=r"of another model \(Linear\): one.weight is absent"):
        _with(Scaled(), torch.randn(8, 16), file)
    with pytest.raises(ArgumentError, match="weight is 4x16 there and 5x16 here"):
        _with(nn.Linear(16, 5), torch.randn(8, 16), file)


def test_a_calibration_of_another_mode(tmp_path: Path) -> None:
    class Either(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.lin(x) if self.training else x @ self.lin.weight + self.lin.bias
            return y

    file, x = tmp_path / "c.json", torch.randn(2, 4)
    graphopt.calibrate(Either(), x).save(file)
    data = json.loads(file.read_text())
    data["tensors"] = {k: v for k, v in data["tensors"].items() if not k.startswith("mm")}
    file.write_text(json.dumps(data))
    with pytest.raises(ArgumentError, match="has no operator mm") as caught:
        _with(Either().eval(), x, file)
    assert "train() or eval()" in caught.value.hint


def test_a_file_that_is_not_there_is_named_by_the_pass(tmp_path: Path) -> None:
    spec = f"cleanup,precision{{cost=roofline,calibration={tmp_path}/none.json}}"
    model = graphopt.optimize(nn.Linear(4, 4), passes=spec, backend="eager")
    with pytest.raises(GraphoptError, match="the calibration cannot be read") as caught:
        model(torch.randn(2, 4))
    assert "none.json" in caught.value.where


def test_names_survive_other_passes_and_batch_sizes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    file = tmp_path / "c.json"
    graphopt.calibrate(Scaled(), torch.randn(8, 16)).save(file)
    graph = capture(Scaled(), (torch.randn(5, 16),)).graph
    spec = f"cleanup,kfac{{damping=0.1}},precision{{cost=roofline,calibration={file},budget=1}}"
    steps = Pipeline.parse(spec).run(graph, PassContext())
    assert steps[-1].outcome.changed
    changes = [
        row["change"]
        for row in steps[-1].outcome.tables["operators"]
        if row["kind"] == "allow" and row["phase"] == "forward"
    ]
    assert len(changes) == 3
    assert None not in changes


# -- against what is measured ----------------------------------------------------------------------


@pytest.mark.corpus
@pytest.mark.parametrize("name", ["resnet", "unet", "densenet", "transformer_encoder"])
def test_expected_changes_rank_layers_as_measured_ones_do(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, args, kwargs = CORPUS[name].make()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0  # type: ignore[assignment]
    found = graphopt.calibrate(model, [(args, kwargs)])
    captured = capture(model, args, kwargs)
    Pipeline.parse("cleanup").run(captured.graph)
    file = tmp_path / "c.json"
    found.save(file)
    pass_ = Precision(cost="roofline", calibration=str(file))
    rows = pass_.apply(captured.graph.copy(), PassContext()).tables["operators"]
    products = [r for r in rows if r["kind"] == "allow" and r["phase"] == "forward"]

    class EachOperator:
        """One operator is one layer."""

        def layers(self, graph: Graph) -> dict[str, tuple[str, ...]]:
            return {str(r["site"]): (str(r["site"]),) for r in products}

        alone = staticmethod(pass_.alone)

    errors = layer_errors(captured.graph, EachOperator(), captured.inputs)[:-1]
    measured = [float(e.output or 0) ** 2 for e in errors]
    expected = [float(r["change"] or 0) for r in products]
    assert spearmanr(expected, measured).statistic > 0.75
