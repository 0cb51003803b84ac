"""The pass as a whole: on generated graphs, as text, beside others, and with bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.analysis import gradient_order
from graphopt.analysis.gradient_order import Device
from graphopt.capture import capture
from graphopt.errors import ArgumentError, PipelineError, SpecError
from graphopt.graph import Graph, operator_name, value_of
from graphopt.passbase import PassContext
from graphopt.passes.precision import Precision
from graphopt.pipeline import Pipeline
from graphopt.plan import Role
from graphopt.testing import assert_same, check_pass, inputs_for, run_graph
from graphopt.text import parse_graph, print_graph
from graphopt.verify import verify
from tests.support.applying import GOLDEN

# A device on which lower precision pays from the first element on.
QUICK = Device(flops=1e9, half_flops=1e12, bandwidth=1e10, overhead=0.0)
RULES = Precision(policy="tf", cost="roofline")


@pytest.fixture
def pays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gradient_order.ASSUMED, "cpu", QUICK)


@pytest.mark.parametrize(
    "pass_",
    [
        Precision(cost="roofline"),
        Precision(cost="roofline", sums="low"),
        RULES,
        Precision(format="fp16", policy="tf", cost="roofline"),
    ],
    ids=str,
)
@pytest.mark.usefixtures("pays")
def test_generated_graphs(pass_: Precision) -> None:
    check_pass(pass_, max_examples=25)


@pytest.mark.usefixtures("pays")
def test_golden() -> None:
    graph = parse_graph((GOLDEN / "precision.before.gopt").read_text())
    inputs = inputs_for(graph)
    expected = run_graph(graph, inputs)
    pass_ = Precision(cost="roofline")
    pass_.apply(graph, PassContext())
    verify(graph, full=True)
    assert_same(expected, run_graph(graph, inputs), pass_.numerics, graph.signature)
    assert print_graph(graph) == (GOLDEN / "precision.after.gopt").read_text()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(16, 16), nn.Linear(16, 4)
        self.norm = nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.body(x))
        y: Tensor = self.head(self.norm(h + x))
        return y


def _graph(model: nn.Module | None = None, x: Tensor | None = None) -> Graph:
    torch.manual_seed(0)
    return capture(model or Net(), (torch.randn(8, 16) if x is None else x,)).graph


def _dtypes(graph: Graph, name: str) -> list[torch.dtype]:
    return [value_of(n).dtype for n in graph.operators if operator_name(n) == name]


@pytest.mark.usefixtures("pays")
def test_parameters_gradients_and_outputs_keep_their_types() -> None:
    graph = _graph()
    Precision(cost="roofline").apply(graph, PassContext())
    assert set(_dtypes(graph, "aten.addmm.default")) == {torch.bfloat16}
    nodes = (*graph.inputs, *graph.outputs)
    assert {value_of(node).dtype for node in nodes} == {torch.float32}
    norm = next(n for n in graph.operators if operator_name(n) == "aten.native_layer_norm.default")
    assert value_of(norm)[0].dtype is torch.float32


@pytest.mark.usefixtures("pays")
def test_a_sum_of_a_wide_and_a_narrow_value_stays_wide() -> None:
    for sums, dtype in (("wide", torch.float32), ("low", torch.bfloat16)):

        class Residual(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.one, self.two = nn.Linear(16, 16), nn.Linear(16, 16)

            def forward(self, x: Tensor) -> Tensor:
                y: Tensor = self.two(x + self.one(x))
                return y

        graph = _graph(Residual())
        Precision(cost="roofline", sums=sums).apply(graph, PassContext())  # type: ignore[arg-type]
        added = [n for n in graph.operators if operator_name(n) == "aten.add.Tensor"]
        assert value_of(added[0]).dtype is dtype


@pytest.mark.usefixtures("pays")
def test_one_cast_per_value() -> None:
    graph = _graph()
    Precision(cost="roofline").apply(graph, PassContext())
    casts = [n for n in graph.operators if operator_name(n) == "aten._to_copy.default"]
    sources = [(n.all_input_nodes[0], value_of(n).dtype) for n in casts]
    assert len(sources) == len(set(sources))


@pytest.mark.usefixtures("pays")
def test_modules_that_are_kept() -> None:
    graph = _graph()
    outcome = Precision(cost="roofline", keep=("he*",)).apply(graph, PassContext())
    assert {d.reason for d in outcome.declined} >= {"kept"}
    assert sorted(map(str, _dtypes(graph, "aten.addmm.default"))) == [
        "torch.bfloat16",
        "torch.float32",
    ]


# -- in a model ------------------------------------------------------------------------------------


def _step(model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    y = model(x)
    y.square().mean().backward()
    return [y.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.usefixtures("pays")
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_model_in_lower_precision(backend: str) -> None:
    torch.manual_seed(0)
    model, x = Net(), torch.randn(8, 16)
    expected = _step(model, x)
    graphopt.optimize(model, passes="cleanup,precision{cost=roofline}", backend=backend)
    for found, wanted in zip(_step(model, x), expected, strict=True):
        assert found.dtype is torch.float32
        error = (found - wanted).abs().max() / wanted.abs().max()
        assert 0 < error < 0.03
    text = model.explain()
    assert "runs in bf16" in text
    assert "bytes saved for backward" in text


@pytest.mark.usefixtures("pays")
def test_beside_kfac_the_statistics_stay_exact() -> None:
    graph = _graph()
    passes = "cleanup,kfac{damping=0.01},precision{cost=roofline}"
    Pipeline.parse(passes).run(graph, PassContext())
    roles = zip(graph.signature.outputs, graph.outputs, strict=True)
    statistics = [node for slot, node in roles if slot.role is Role.AUX]
    assert statistics
    for node in statistics:
        operands = (value_of(n) for n in node.all_input_nodes)
        assert {v.dtype for v in operands if isinstance(v, Tensor)} == {torch.float32}
    assert torch.bfloat16 in _dtypes(graph, "aten.addmm.default")


@pytest.mark.usefixtures("pays")
def test_training_with_kfac_in_lower_precision() -> None:
    torch.manual_seed(0)
    model, x = Net(), torch.randn(32, 16)
    spec = "cleanup,kfac{damping=0.1},precision{cost=roofline}"
    graphopt.optimize(model, passes=spec, backend="eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = (model(x) - x[:, :4]).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


# -- what is left alone, and bad input -------------------------------------------------------------


def _outcome(model: nn.Module, x: Tensor, **options: Any) -> Any:
    graph = _graph(model, x)
    outcome = Precision(cost="roofline", **options).apply(graph, PassContext())
    return graph, outcome


@pytest.mark.usefixtures("pays")
def test_what_lowers_itself_is_left_alone() -> None:
    class Casts(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return super().forward(x)

    for model, x in (
        (Casts(16, 4), torch.randn(2, 16)),
        (nn.Linear(16, 4).half(), torch.randn(2, 16).half()),
    ):
        _, outcome = _outcome(model, x)
        assert not outcome.changed
        assert [d.reason for d in outcome.declined] == ["lowered-already"]


@pytest.mark.usefixtures("pays")
def test_integers_complex_numbers_and_doubles_are_left_alone() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.lin = nn.Embedding(5, 16), nn.Linear(16, 4)

        def forward(self, ids: Tensor) -> Tensor:
            h = self.table(ids)
            wave = torch.fft.rfft(h).abs().sum(-1, keepdim=True)
            y: Tensor = self.lin(h) + wave.double().float()
            return y

    graph, outcome = _outcome(Odd(), torch.randint(5, (8,)))
    assert outcome.changed
    unknown = {d.detail for d in outcome.declined if d.reason == "no-rule"}
    assert any("aten.embedding.default" in text for text in unknown)
    graph.fx.lint()


@pytest.mark.usefixtures("pays")
def test_empty_batches() -> None:
    graph, _ = _outcome(Net(), torch.randn(0, 16))
    graph.fx.lint()


def test_nothing_to_lower() -> None:
    _, outcome = _outcome(nn.LayerNorm(16), torch.randn(2, 16))
    assert [d.reason for d in outcome.declined] == ["nothing-to-lower"]


def test_what_is_not_faster_stays_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Device(flops=1e12, half_flops=1e9, bandwidth=1e10, overhead=0.0)
    monkeypatch.setitem(gradient_order.ASSUMED, "cpu", slow)
    _, outcome = _outcome(Net(), torch.randn(8, 16))
    assert not outcome.changed
    assert {d.reason for d in outcome.declined} == {"not-faster"}
    assert outcome.declined[0].numbers["low_us"] > outcome.declined[0].numbers["float32_us"]


@pytest.mark.usefixtures("pays")
def test_a_pattern_that_matches_no_module() -> None:
    with pytest.raises(ArgumentError, match="keep=hed matches no module") as caught:
        _outcome(Net(), torch.randn(8, 16), keep=("hed",))
    assert "head" in caught.value.hint


def test_orders_and_values_that_cannot_be() -> None:
    with pytest.raises(PipelineError, match="'kfac' must run before 'precision'"):
        Pipeline.parse("precision,kfac{damping=0.01}")
    with pytest.raises(PipelineError, match="precision"):
        Pipeline.parse("precision,precision")
    with pytest.raises(SpecError, match="bf17"):
        Pipeline.parse("precision{format=bf17}")


def test_times_are_measured_on_this_machine() -> None:
    torch.manual_seed(0)
    model, x = Net(), torch.randn(8, 16)
    expected = _step(model, x)
    graphopt.optimize(model, passes="precision", backend="eager")
    for found, wanted in zip(_step(model, x), expected, strict=True):
        assert (found - wanted).abs().max() <= 0.03 * wanted.abs().max()
