"""The pass on graphs: as text, on generated graphs, what it declines and what it refuses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from graphopt.capture import capture_forward
from graphopt.errors import ArgumentError, PipelineError
from graphopt.passbase import Outcome, PassContext
from graphopt.passes.low_rank import LowRank
from graphopt.passes.low_rank.candidates import forms_within
from graphopt.pipeline import Pipeline
from graphopt.structured import StructuredWeight
from graphopt.testing import check_pass, forward_graphs, inputs_for, run_graph
from graphopt.text import parse_graph, print_graph
from graphopt.verify import verify
from tests.low_rank.models import smooth
from tests.support.applying import GOLDEN

aten = torch.ops.aten


def _apply(pass_: LowRank, model: nn.Module, *args: Tensor, **values: Tensor) -> Outcome:
    graph = capture_forward(model, args)
    parameters = {**dict(model.named_parameters(remove_duplicate=False)), **values}
    return pass_.apply(graph, PassContext(parameters=parameters, running="low_rank"))


def _probed(weight: Tensor, pass_: LowRank) -> Outcome:
    layer = nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype)
    layer.weight.data.copy_(weight)
    return _apply(pass_, layer, torch.ones(5, weight.shape[1], dtype=weight.dtype))


# -- what it makes ---------------------------------------------------------------------------------


def test_golden() -> None:
    graph = parse_graph((GOLDEN / "low_rank.before.gopt").read_text())
    inputs = dict(zip((s.name for s in graph.signature.inputs), inputs_for(graph), strict=True))
    i = torch.arange(4.0)
    inputs["mix.weight"] = torch.outer(i + 1, i - 5)
    inputs["left"] = (i[:, None] - i).cos() + (i[:, None] > i)
    (expected,) = run_graph(graph, list(inputs.values()))
    pass_ = LowRank(smallest=3, gain=0.2, cost="roofline")
    outcome = pass_.apply(graph, PassContext(parameters=inputs, running="low_rank"))
    verify(graph, full=True)
    assert print_graph(graph) == (GOLDEN / "low_rank.after.gopt").read_text()
    assert [a.what for a in outcome.applied] == [
        "replaced by factors: flat, rank 1",
        "replaced by factors: toeplitz",
    ]
    assert [(d.site, d.reason) for d in outcome.declined] == [("head.weight", "small")]
    for name, made_by in outcome.parametrized.items():
        assert isinstance(made_by, StructuredWeight)
        for number, factor in enumerate(made_by.right_inverse(inputs[name])):
            path, _, tensor = name.rpartition(".")
            inputs[f"{path}.parametrizations.{tensor}.original{number}".lstrip(".")] = factor
    given_now = [inputs[slot.name] for slot in graph.signature.inputs]
    torch.testing.assert_close(run_graph(graph, given_now)[0], expected)


def test_generated_graphs() -> None:
    kinds = ["linear", "unary", "binary", "product", "transpose", "reshape", "layer_norm"]
    graphs = st.one_of(forward_graphs(kinds=[*kinds, "linear"]), forward_graphs())
    pass_ = LowRank(tolerance=1e-5, smallest=1, gain=0.0, cost="roofline")
    check_pass(pass_, graphs=graphs, max_examples=40)


PRODUCTS = {
    "linear": lambda w, x: torch.nn.functional.linear(x, w),
    "of the transpose": lambda w, x: torch.nn.functional.linear(x, w.t()),
    "x @ w": lambda w, x: x @ w,
    "x @ w.T": lambda w, x: x @ w.T,
    "matmul of a batch": lambda w, x: x[None].expand(2, -1, -1).matmul(w.mT),
    "w @ x": lambda w, x: w @ x,
    "w.T @ x": lambda w, x: torch.transpose(w, 0, 1).mm(x),
    "w @ vector": lambda w, x: torch.mv(w, x[0]),
    "vector @ w": lambda w, x: x[0] @ w,
    "addmm": lambda w, x: torch.addmm(x[0], x, w.transpose(1, 0)),
    "addmm of a matrix": lambda w, x: torch.addmm(x, w, x),
    "twice": lambda w, x: torch.nn.functional.linear(x @ w, w),
    "in place behind": lambda w, x: torch.nn.functional.linear(x, w).relu_().view(2, -1),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_every_product_with_a_weight(name: str) -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(smooth(32, torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            made: Tensor = PRODUCTS[name](self.w, x)
            return made

    model, x = Layer(), torch.randn(32, 32, dtype=torch.float64)
    graph = capture_forward(model, (x,))
    parameters = dict(model.named_parameters())
    pass_ = LowRank(tolerance=1e-9, smallest=8, gain=0.0, cost="roofline")
    outcome = pass_.apply(graph, PassContext(parameters=parameters, running="low_rank"))
    verify(graph, full=True)
    (made_by,) = outcome.parametrized.values()
    assert isinstance(made_by, StructuredWeight)
    factors = made_by.right_inverse(model.w.detach())
    inputs = [x if slot.name == "x" else None for slot in graph.signature.inputs]
    rest = iter(factors)
    (made,) = run_graph(graph, [next(rest) if i is None else i for i in inputs])
    torch.testing.assert_close(made, model(x), rtol=1e-7, atol=1e-9)
    called = [str(node.target) for node in graph.operators]
    assert any("structured" in target for target in called)
    assert not any("structured_dense" in target for target in called)


# -- what it promises ------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 99),
    tolerance=st.sampled_from([1e-1, 1e-2, 1e-4, 1e-8]),
    power=st.integers(0, 6),
    rows=st.sampled_from([32, 64, 96]),
    cols=st.sampled_from([32, 64]),
)
def test_errors_are_within_the_tolerance(
    seed: int, tolerance: float, power: int, rows: int, cols: int
) -> None:
    """By the dense difference in double precision; flat ranks are the least by the SVD."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(rows, generator=generator, dtype=torch.float64).sort()[0]
    y = torch.rand(cols, generator=generator, dtype=torch.float64).sort()[0]
    weight = torch.exp(-(x[:, None] - y).abs() * 2.0**power)
    weight = weight * (1 + x[:, None]) * (1 + y)
    norm = float(weight.norm())
    found = list(forms_within(weight, tolerance, float("inf")))
    assert {"flat", "hodlr"} <= {form.name for form in found}
    for form in found:
        near = form.dense(form.factors(weight))
        assert float((near - weight).norm()) <= tolerance * norm * (1 + 1e-9)
        if form.name == "flat":
            tail = torch.linalg.svdvals(weight)[form.rank - 1 :]
            assert form.rank == 1 or float(tail.norm()) > tolerance * norm


def test_a_candidate_has_fewer_numbers_than_the_weight() -> None:
    assert not list(forms_within(torch.randn(64, 64), 1e-3, 64 * 64))
    toeplitz = torch.arange(64.0)[:, None] - torch.arange(48.0)
    names = [form.name for form in forms_within(toeplitz.sin(), 1e-6, 64 * 48)]
    assert "toeplitz" in names
    assert "flat" in names  # a sine of a difference has rank 2


# -- what it declines ------------------------------------------------------------------------------


def test_an_ordinary_weight_stays_dense_with_the_numbers() -> None:
    weight = torch.randn(300, 280, generator=torch.Generator().manual_seed(0))
    outcome = _probed(weight, LowRank(cost="roofline"))
    (declined,) = outcome.declined
    assert (declined.site, declined.reason) == ("weight", "full-rank")
    rank = int(300 * 280 / 1.1 / 580)
    error = torch.linalg.svdvals(weight.double())[rank:].norm() / weight.double().norm()
    assert declined.numbers["rank"] == rank
    assert declined.numbers["error"] == pytest.approx(float(error), rel=1e-6)
    assert not outcome.applied
    (row,) = outcome.tables["weights"] if outcome.tables else [None]
    assert row is not None
    assert row["form"] == "dense"


def test_a_form_that_is_slower_is_declined_with_both_times() -> None:
    outcome = _probed(smooth(256), LowRank(cost="roofline", gain=1e6))
    (declined,) = outcome.declined
    assert declined.reason == "full-rank"  # none has a millionth of the numbers
    outcome = _probed(smooth(32), LowRank(cost="roofline", smallest=8, gain=1.0))
    (declined,) = outcome.declined
    assert declined.reason == "dense-is-faster"
    assert declined.numbers["dense_ms"] < declined.numbers["form_ms"]


def test_times_are_measured() -> None:
    weight = torch.outer(torch.ones(1024), torch.linspace(1, 2, 1024))
    outcome = _probed(weight, LowRank())
    assert [a.site for a in outcome.applied] == ["weight"]
    rows = {row["form"]: row for row in outcome.tables["weights"]}
    assert rows["flat, rank 1"]["why"] == "chosen"
    assert all(row["seconds"] > 0 for row in rows.values())


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(32, 32)
        self.second = nn.Linear(32, 32)
        self.table = nn.Embedding(40, 32)
        self.scale = nn.Parameter(torch.ones(32, 32))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.second(self.first(self.table(ids)))
        return torch.nn.functional.linear(x, self.scale * 2) + self.scale[0]


def _reasons(model: nn.Module, *args: Tensor) -> dict[str, str]:
    pass_ = LowRank(smallest=8, gain=0.0, cost="roofline")
    return {d.site: d.reason for d in _apply(pass_, model, *args).declined}


def test_what_cannot_be_replaced_is_declined_with_the_reason() -> None:
    model, ids = _Net(), torch.arange(4)
    model.second.weight = model.first.weight
    with torch.no_grad():
        model.first.weight.copy_(smooth(32))
    reasons = _reasons(model, ids)
    assert reasons["first.weight"] == "tied"
    assert reasons["table.weight"] == "read-otherwise"
    assert reasons["scale"] == "read-otherwise"
    assert "computed" in reasons.values()

    model = _Net()
    with torch.no_grad():
        model.first.weight[3, 4] = float("nan")
    model.second.weight.register_hook(lambda g: None)
    reasons = _reasons(model, ids)
    assert reasons["first.weight"] == "not-finite"
    assert reasons["second.weight"] == "hooked"

    model = _Net()
    nn.init.zeros_(model.first.weight)
    assert _reasons(model, ids)["first.weight"] == "zero"

    model = _Net()
    nn.utils.parametrizations.weight_norm(model.first)
    reasons = _reasons(model, ids)
    assert "computed" in reasons.values()
    assert "first.weight" not in reasons


def test_a_weight_of_integers_stays() -> None:
    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(16, 16, dtype=torch.int64), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.w

    assert _reasons(Whole(), torch.ones(2, 16, dtype=torch.int64)) == {"w": "no-float"}


def test_without_parameters_nothing_is_probed() -> None:
    graph = capture_forward(nn.Linear(16, 16), (torch.ones(2, 16),))
    outcome = LowRank(smallest=8).apply(graph, PassContext(running="low_rank"))
    assert [(d.site, d.reason) for d in outcome.declined] == [("weight", "not-probed")]


# -- what it refuses -------------------------------------------------------------------------------


def test_a_tolerance_below_the_type_names_the_one_that_can_be_reached() -> None:
    layer = nn.Linear(300, 300)
    with pytest.raises(ArgumentError, match=r"1e-09 is below what factors in float32") as told:
        _apply(LowRank(tolerance=1e-9), layer, torch.ones(2, 300))
    assert "9.5e-07 or more" in told.value.hint
    assert told.value.where == "weight"
    outcome = _apply(LowRank(tolerance=1e-9), layer.double(), torch.ones(2, 300).double())
    assert outcome.declined


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tolerance": 0.0}, "tolerance=0.0 is no relative error"),
        ({"tolerance": 1.0}, "tolerance=1.0 is no relative error"),
        ({"smallest": 0}, "smallest=0"),
        ({"gain": -1.0}, "gain=-1.0"),
    ],
)
def test_options_that_mean_nothing(options: dict[str, float], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        LowRank(**options)  # type: ignore[arg-type]


def test_it_runs_before_what_needs_a_backward() -> None:
    with pytest.raises(PipelineError, match="'low_rank' rewrites the forward graph") as told:
        Pipeline.parse("cleanup,low_rank")
    assert told.value.hint == "this order works: low_rank,cleanup"
    assert str(Pipeline.parse("low_rank,cleanup")) == "low_rank,cleanup"
