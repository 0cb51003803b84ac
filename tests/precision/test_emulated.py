"""Formats that are emulated: which operands are rounded, along which axis, and what is saved."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import graphopt
from graphopt.analysis.aliasing import storage
from graphopt.analysis.liveness import liveness
from graphopt.capture import capture
from graphopt.errors import ArgumentError
from graphopt.graph import Graph, operator_name, phase_of, value_of
from graphopt.passbase import Outcome, PassContext
from graphopt.passes.precision import Precision, emulated
from graphopt.passes.precision.emulated import apply_emulated
from graphopt.passes.precision.formats import Format
from graphopt.passes.precision.recipes import recipe_of
from graphopt.pipeline import Pipeline
from graphopt.plan import Phase, Role
from graphopt.testing import assert_same, check_pass, inputs_for, joint_graphs, run_graph
from graphopt.text import parse_graph, print_graph
from graphopt.verify import verify
from tests.support.applying import GOLDEN

ops = torch.ops.graphopt
SPECS = {
    "flex16": Precision(format="flex16"),
    "mxfp8": Precision(format="mxfp8"),
    "mxfp8 rceil": Precision(format="mxfp8", scaling="rceil"),
    "float8": Precision(format="float8"),
    "float8 row": Precision(format="float8", granularity="row"),
}
BY_AXIS = ["mxfp8", "mxfp8 rceil", "float8 row"]
ALL = pytest.mark.parametrize("name", SPECS)
QUANTISERS = {ops.flex16_quantise, ops.mx_quantise, ops.float8_quantise}

PRODUCTS = {"aten.addmm.default", "aten.mm.default", "aten.bmm.default"}
READ_BACK = {
    "graphopt.flex16_dequantise.default",
    "graphopt.mx_dequantise.default",
    "graphopt.float8_dequantise.default",
    "aten.t.default",
    "aten.transpose.int",
    "aten.permute.default",
}

MLP = nn.Sequential(nn.Linear(40, 48), nn.GELU(), nn.Linear(48, 8))


def graph_of(model: nn.Module, *args: Any) -> Graph:
    graph = capture(model, args).graph
    Pipeline.parse("cleanup").run(graph, PassContext())
    return graph


def applied(name: str, model: nn.Module, *args: Any) -> tuple[Graph, Outcome]:
    graph = graph_of(model, *args)
    outcome = SPECS[name].apply(graph, PassContext())
    verify(graph, full=True)
    return graph, outcome


def quantisers(graph: Graph) -> list[Any]:
    return [n for n in graph.operators if getattr(n.target, "overloadpacket", None) in QUANTISERS]


def inputs_of(graph: Graph, model: nn.Module, x: Tensor) -> list[Tensor]:
    """Parameters of the model, and `x`; tangents at random."""
    values = {**dict(model.named_parameters()), "input": x, "x": x}
    slots = zip(graph.signature.inputs, inputs_for(graph), strict=True)
    return [values.get(slot.name, given).detach() for slot, given in slots]


def step(model: nn.Module, x: Tensor, tangent: Tensor) -> list[Tensor]:
    model.zero_grad()
    y = model(x)
    y.backward(tangent)
    return [y.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


# -- on generated graphs ---------------------------------------------------------------------------


@ALL
def test_generated_graphs(name: str) -> None:
    check_pass(SPECS[name], max_examples=14)


@ALL
def test_generated_products_and_convolutions(name: str) -> None:
    kinds = ("linear", "product", "convolution", "transpose", "unary", "binary")
    check_pass(SPECS[name], graphs=joint_graphs(max_steps=5, kinds=kinds), max_examples=10)


def test_golden() -> None:
    graph = parse_graph((GOLDEN / "precision.before.gopt").read_text())
    inputs = inputs_for(graph)
    expected = run_graph(graph, inputs)
    pass_ = SPECS["mxfp8"]
    pass_.apply(graph, PassContext())
    verify(graph, full=True)
    assert_same(expected, run_graph(graph, inputs), pass_.numerics, graph.signature)
    assert print_graph(graph) == (GOLDEN / "precision.mxfp8.gopt").read_text()


# -- what a linear layer computes ------------------------------------------------------------------


def rounded(name: str, x: Tensor, axis: int, is_gradient: bool) -> Tensor:
    """The operand of a product in the format, written out."""
    result: Tensor
    if name == "flex16":
        result = ops.flex16_dequantise(*ops.flex16_quantise(x))
    elif name.startswith("mxfp8"):
        rule = "rceil" if "rceil" in name else "floor"
        result = ops.mx_dequantise(*ops.mx_quantise(x, axis, rule), axis)
    elif name == "float8 row":
        result = ops.float8_dequantise(*ops.float8_quantise(x, torch.float8_e4m3fn, axis, True))
    else:
        dtype = torch.float8_e5m2 if is_gradient else torch.float8_e4m3fn
        result = ops.float8_dequantise(*ops.float8_quantise(x, dtype, None, False))
    return result


@ALL
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_the_three_products_of_a_linear_layer(name: str, backend: str) -> None:
    torch.manual_seed(0)
    model, x, dy = nn.Linear(70, 24), torch.randn(40, 70), torch.randn(40, 24)
    w, b = model.weight.detach().clone(), model.bias.detach().clone()
    spec = f"cleanup,{graphopt.pipeline.spec.format_pass(SPECS[name])}"
    graphopt.optimize(model, passes=spec, backend=backend)
    x.requires_grad_()
    y, dw, db = step(model, x, dy)

    def q(value: Tensor, axis: int, is_gradient: bool = False) -> Tensor:
        return rounded(name, value, axis, is_gradient)

    plain = x.detach()
    wanted = q(plain, 1) @ q(w, 1).t() + b
    assert torch.allclose(y, wanted, rtol=1e-5, atol=1e-5)
    assert torch.allclose(dw, q(dy, 0, True).t() @ q(plain, 0), rtol=1e-5, atol=1e-5)
    assert torch.allclose(db, dy.sum(0), rtol=1e-5, atol=1e-5)
    assert x.grad is not None
    assert torch.allclose(x.grad, q(dy, 1, True) @ q(w, 0), rtol=1e-5, atol=1e-5)


class Attention(nn.Module):
    """Products of batches of matrices, and one tensor that three products read."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(32, 32, bias) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        return torch.softmax(q @ k.mT / 6, -1) @ v


@ALL
def test_one_quantiser_per_tensor_and_axis(name: str) -> None:
    torch.manual_seed(0)
    graph, outcome = applied(name, Attention(), torch.randn(2, 7, 32))
    # What is there in both halves anyway is quantised in each of them, and nothing is saved of it.
    owner, saved = graph.get(storage).owner, graph.get(liveness).saved

    def is_in_both(base: fx.Node) -> bool:
        return owner[base].op == "placeholder" or owner[base] in saved

    found = [
        (n.args[0], *map(str, n.args[1:]), is_in_both(n.args[0]) and phase_of(n))
        for n in quantisers(graph)
    ]
    assert len(found) == len(set(found))
    summary = next(a for a in outcome.applied if a.site == "operands")
    assert summary.numbers["quantisers"] == len(found)
    products = [n for n in graph.operators if operator_name(n) in PRODUCTS]
    assert summary.numbers["products"] == len(products) == 12
    for product in products:
        operands = product.args[1:] if "addmm" in operator_name(product) else product.args
        assert all(operator_name(n) in READ_BACK for n in operands)


@ALL
def test_gradients_are_within_the_bound(name: str) -> None:
    torch.manual_seed(0)
    pass_ = SPECS[name]
    # The bias of keys has no gradient but rounding.
    for model, x in ((MLP, torch.randn(64, 40)), (Attention(bias=False), torch.randn(2, 16, 32))):
        graph = graph_of(model, x)
        inputs = inputs_of(graph, model, x)
        expected = run_graph(graph, inputs)
        pass_.apply(graph, PassContext())
        assert_same(expected, run_graph(graph, inputs), pass_.numerics, graph.signature)


# -- what is saved ---------------------------------------------------------------------------------


@ALL
def test_only_quantised_activations_are_saved(name: str) -> None:
    model, x = MLP, torch.randn(512, 40)
    before = graph_of(model, x).get(liveness).saved_bytes
    graph, outcome = applied(name, model, x)
    saved = graph.get(liveness).saved
    # The input of GELU is read by its backward; its result is small.
    wide = [n for n in saved if value_of(n).dtype is torch.float32 and value_of(n).numel() > 200]
    assert [operator_name(n) for n in wide] == ["aten.addmm.default"]
    numbers = next(a for a in outcome.applied if a.site == "activations").numbers
    assert numbers["before"] == before
    assert numbers["after"] == graph.get(liveness).saved_bytes
    assert numbers["tensors saved in float32"] == 0
    assert numbers["after"] < (0.8 if name == "flex16" else 0.7) * before


def test_what_the_backward_reads_wide_is_saved_once() -> None:
    """The result of a ReLU is its backward's mask, so that it is quantised there again."""
    model, x = nn.Sequential(nn.Linear(40, 48), nn.ReLU(), nn.Linear(48, 8)), torch.randn(64, 40)
    before = graph_of(model, x).get(liveness).saved_bytes
    graph, outcome = applied("mxfp8", model, x)
    assert graph.get(liveness).saved_bytes == before
    numbers = next(a for a in outcome.applied if a.site == "activations").numbers
    assert numbers["tensors saved in float32"] == 1
    relu = next(n for n in graph.operators if operator_name(n) == "aten.relu.default")
    phases = {phase_of(n) for n in quantisers(graph) if n.args[0] is relu}
    assert phases == {Phase.FORWARD, Phase.BACKWARD}


# -- what is left alone ----------------------------------------------------------------------------


class Picture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.conv(x).mean((2, 3)))
        return y


@ALL
def test_convolutions_have_no_axis(name: str) -> None:
    graph, outcome = applied(name, Picture(), torch.randn(2, 3, 8, 8))
    reasons = {d.reason: d for d in outcome.declined}
    convolution = next(n for n in graph.operators if operator_name(n) == "aten.convolution.default")
    if name in BY_AXIS:
        assert "contracts several axes" in reasons["no-axis"].detail
        assert convolution.args[0].op == "placeholder"
    else:
        assert "no-axis" not in reasons
        assert convolution.args[0].op == "call_function"


def test_attention_in_one_operator() -> None:
    class Fused(nn.Module):
        def forward(self, q: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(q @ q.mT, q, q)

    q = torch.randn(2, 2, 8, 8, requires_grad=True)
    _, outcome = applied("mxfp8", Fused(), q)
    assert "not-a-product" in {d.reason for d in outcome.declined}
    assert outcome.changed


@ALL
def test_modules_that_are_kept(name: str) -> None:
    graph = graph_of(MLP, torch.randn(4, 40))
    pass_ = SPECS[name]
    kept = type(pass_)(format=pass_.format, keep=("2",), granularity=pass_.granularity)
    outcome = kept.apply(graph, PassContext())
    assert {d.reason for d in outcome.declined} == {"kept"}
    addmms = [n for n in graph.operators if operator_name(n) == "aten.addmm.default"]
    assert [n.args[1].op for n in addmms] == ["call_function", "call_function"]
    assert "quantise" in operator_name(addmms[0].args[1])
    assert operator_name(addmms[1].args[1]) == "aten.gelu.default"


@ALL
def test_what_lowers_itself_is_left_alone(name: str) -> None:
    model = nn.Linear(16, 4).half()
    _, outcome = applied(name, model, torch.randn(2, 16).half())
    assert [d.reason for d in outcome.declined] == ["lowered-already"]


@ALL
def test_integers_complex_numbers_doubles_and_nothing(name: str) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.lin = nn.Embedding(5, 16), nn.Linear(16, 4)

        def forward(self, ids: Tensor) -> Tensor:
            h = self.table(ids)
            wave = torch.fft.rfft(h)
            wide = (wave @ wave.mT).abs().sum() + (h.double() @ h.double().mT).sum().float()
            y: Tensor = self.lin(h) + wide
            return y

    graph, outcome = applied(name, Odd(), torch.randint(5, (8,)))
    assert outcome.changed
    for node in quantisers(graph):
        assert value_of(node.args[0]).dtype is torch.float32
    _, outcome = applied(name, nn.LayerNorm(4), torch.randn(2, 4))
    assert [d.reason for d in outcome.declined] == ["nothing-to-lower"]


@ALL
def test_empty_batches(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Linear(16, 4)
    graphopt.optimize(model, passes=[SPECS[name]], backend="eager")
    y, dw, _ = step(model, torch.randn(0, 16), torch.randn(0, 4))
    assert y.shape == (0, 4)
    assert not dw.any()


@ALL
def test_beside_kfac_the_statistics_stay_exact(name: str) -> None:
    torch.manual_seed(0)
    spec = "cleanup,kfac{damping=0.01}"
    graphs = [capture(MLP, (torch.randn(8, 40),)).graph for _ in range(2)]
    Pipeline.parse(spec).run(graphs[0], PassContext())
    Pipeline((*Pipeline.parse(spec).passes, SPECS[name])).run(graphs[1], PassContext())
    assert quantisers(graphs[1])
    for graph in graphs:
        slots = zip(graph.signature.outputs, graph.outputs, strict=True)
        statistics = [node for slot, node in slots if slot.role is Role.AUX]
        assert statistics
        for node in statistics:
            assert not any(
                "quantise" in operator_name(n)
                for n in node.all_input_nodes
                if n.op != "placeholder"
            )


# -- bad input -------------------------------------------------------------------------------------


@ALL
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_seen(name: str, bad: float) -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(40, 8), torch.randn(4, 40)
    x[1, 3] = bad
    graphopt.optimize(model, passes=[SPECS[name]], backend="eager", verify="structure")
    y, dw, _ = step(model, x, torch.randn(4, 8))
    assert not y[1].isfinite().any()
    assert not dw[:, 3].isfinite().any()
    if name in BY_AXIS:
        assert y[0].isfinite().all()


@ALL
def test_zeros_and_an_outlier(name: str) -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(40, 8), torch.zeros(4, 40)
    graphopt.optimize(model, passes=[SPECS[name]], backend="eager")
    y, dw, _ = step(model, x, torch.randn(4, 8))
    assert torch.equal(y, model.bias.detach().expand(4, 8))
    assert not dw.any()
    x[2, 1] = 1e30
    y, dw, _ = step(model, x, torch.randn(4, 8))
    assert y.isfinite().all()
    assert dw.isfinite().all()


def test_options_of_another_format() -> None:
    graph = graph_of(MLP, torch.randn(4, 40))
    with pytest.raises(ArgumentError, match="granularity=row says nothing about format=mxfp8"):
        Precision(format="mxfp8", granularity="row").apply(graph, PassContext())
    with pytest.raises(
        ArgumentError, match="scaling=rceil says nothing about format=bf16"
    ) as caught:
        Precision(scaling="rceil").apply(graph, PassContext())
    assert "format=mxfp8" in caught.value.hint


# -- devices ---------------------------------------------------------------------------------------


def test_a_device_that_does_not_convert() -> None:
    graph = graph_of(MLP, torch.randn(4, 40))
    recipe = recipe_of("mxfp8", {"scaling": "floor"})
    assert recipe is not None
    format = Format("bits", torch.bits16, 1.0)
    outcome = apply_emulated(graph, format, recipe, frozenset())
    assert not outcome.changed
    (declined,) = outcome.declined
    assert declined.reason == "not-on-this-device"
    assert "cpu does not convert to torch.bits16" in declined.detail


@pytest.mark.parametrize("name", ["mxfp8", "float8", "float8 row"])
def test_products_with_scales_where_there_are_some(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graph of a device that has them, run by the operator's definition."""
    torch.manual_seed(0)
    x = torch.randn(64, 40)
    plain, _ = applied(name, MLP, x)
    monkeypatch.setattr(emulated, "has_scaled_mm", lambda *_: True)
    graph, _ = applied(name, MLP, x)
    names = [operator_name(n) for n in graph.operators]
    assert names.count("graphopt.scaled_mm.default") == 5
    assert not any("dequantise" in n or "mm.default" in n.replace("scaled_mm", "") for n in names)
    inputs = inputs_for(graph)
    for found, wanted in zip(run_graph(graph, inputs), run_graph(plain, inputs), strict=True):
        assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_a_weight_that_is_not_a_matrix_of_a_layer() -> None:
    """Products of functions and batches, one of them of a tensor with itself."""

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(3, 8, 8))

        def forward(self, x: Tensor) -> Tensor:
            return torch.baddbmm(x, self.w, self.w.mT, alpha=0.5) @ torch.mv(x[0], x[0, 0])

    torch.manual_seed(0)
    graph, outcome = applied("mxfp8", Own(), torch.randn(3, 8, 8))
    assert {a.what.split()[0] for a in outcome.applied} >= {
        "aten.baddbmm.default",
        "aten.mv.default",
    }
    weights = [
        n for n in quantisers(graph) if n.args[0].name == "w" and phase_of(n) is Phase.FORWARD
    ]
    assert [n.args[1] for n in weights] == [2]


def test_the_table_of_products() -> None:
    _, outcome = applied("mxfp8", Picture(), torch.randn(2, 3, 8, 8))
    rows, (totals,) = outcome.tables["operators"], outcome.tables["totals"]
    formats = {row["operator"]: (row["format"], row["reason"]) for row in rows}
    assert formats["aten.convolution.default"] == ("float32", "no-axis")
    assert ("mxfp8", "") in formats.values()
    assert totals["operators"] == len(rows)
    assert totals["lowered"] == sum(row["format"] == "mxfp8" for row in rows)
    assert totals["float32_us"] is None


def test_a_calibration_says_nothing_of_it() -> None:
    with pytest.raises(ArgumentError, match="say nothing of rounding to mxfp8"):
        Precision(format="mxfp8", calibration="ranges.json")
