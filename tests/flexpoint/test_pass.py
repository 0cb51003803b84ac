"""The pass: on generated graphs, as text, what it declines, and what the backward keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from graphopt.analysis.liveness import liveness
from graphopt.capture import capture
from graphopt.errors import ArgumentError, PipelineError
from graphopt.graph import Graph, operator_name, phase_of, value_of
from graphopt.passbase import Outcome, PassContext
from graphopt.passes.flexpoint import Flexpoint
from graphopt.pipeline import Pipeline
from graphopt.plan import Phase, Role
from graphopt.plan.flexpoint import FlexTensors
from graphopt.testing import assert_same, check_pass, inputs_for, run_graph
from graphopt.text import parse_graph, print_graph
from graphopt.verify import verify
from tests.flexpoint.models import conv_net
from tests.support.applying import GOLDEN, reasons, targets


@pytest.mark.parametrize(
    "pass_",
    [
        Flexpoint(),
        Flexpoint(mantissa=10, autoflex="current"),
        Flexpoint(exponent=8, rounding="stochastic", master_weights=False),
    ],
    ids=str,
)
def test_generated_graphs(pass_: Flexpoint) -> None:
    check_pass(pass_, max_examples=20)


def _applied(graph: Graph, pass_: Flexpoint | None = None) -> tuple[Outcome, list[Tensor]]:
    """The outcome, and how the graph's own outputs come out of it."""
    pass_ = pass_ or Flexpoint()
    values = dict(zip(graph.signature.inputs, inputs_for(graph), strict=True))
    slots, ctx = graph.signature.outputs, PassContext(running="flexpoint")
    outcome = pass_.apply(graph, ctx)
    verify(graph, full=True)
    given = [values.get(s, ctx.state.get(s.name.partition("/")[2])) for s in graph.signature.inputs]
    assert all(value is not None for value in given)
    found = dict(zip(graph.signature.outputs, run_graph(graph, given), strict=True))  # type: ignore[arg-type]
    return outcome, [found[slot] for slot in slots]


def test_golden() -> None:
    graph = parse_graph((GOLDEN / "flexpoint.before.gopt").read_text())
    expected = run_graph(graph, inputs_for(graph))
    signature = graph.signature
    _, found = _applied(graph)
    assert_same(expected, found, Flexpoint().numerics, signature)
    assert print_graph(graph) == (GOLDEN / "flexpoint.after.gopt").read_text()


def _graph(model: nn.Module, *inputs: Tensor) -> Graph:
    return capture(model, inputs).graph


def _count(graph: Graph, name: str, phase: Phase | None = None) -> int:
    return sum(name in operator_name(n) and phase in (None, phase_of(n)) for n in graph.operators)


# -- which tensors ---------------------------------------------------------------------------------


def test_one_quantiser_per_value_and_none_behind_what_moves() -> None:
    graph = _graph(conv_net(), torch.randn(4, 3, 8, 8))
    outcome, _ = _applied(graph)
    names = {a.site for a in outcome.applied}
    moving = ("relu", "view", "threshold", "max_pool2d", "t_", "permute", "clone")
    assert not [name for name in names if name.startswith(moving)]
    part = outcome.part
    assert isinstance(part, FlexTensors)
    assert len(set(part.names)) == len(part.names) == len(outcome.applied) - 1
    assert set(part.names) >= {"conv_weight", "x", "head_bias", "convolution", "addmm"}
    assert set(reasons(outcome)) >= {("norm_running_mean", "state"), ("getitem_1", "statistic")}


def test_gradients_and_outputs_are_flex_values() -> None:
    graph = _graph(conv_net(), torch.randn(4, 3, 8, 8))
    slots = graph.signature.outputs
    _, found = _applied(graph)
    for slot, value in zip(slots, found, strict=True):
        if slot.role is Role.MUTATION:
            continue
        unit = 2.0 ** (torch.frexp(value.abs().max()).exponent - 15)
        assert torch.equal(value / unit, (value / unit).round()), slot


def test_statistics_of_norms_stay_as_they_are() -> None:
    graph = _graph(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)), torch.randn(4, 8))
    _outcome, _ = _applied(graph)
    (norm,) = [n for n in graph.operators if "native_layer_norm.default" in operator_name(n)]
    readers = {n.args[1]: list(n.users) for n in norm.users}
    assert "flex_quantise" in operator_name(readers[0][0]) or "flex_round" in operator_name(
        readers[0][0]
    )
    backward = "aten.native_layer_norm_backward.default"
    assert {operator_name(u) for i in (1, 2) for u in readers[i]} == {backward}


def test_masks_are_left_alone() -> None:
    class Masked(nn.Module):
        def forward(self, x: Tensor, mask: Tensor, bias: Tensor) -> Tensor:
            h = (x @ x.transpose(-1, -2)).masked_fill(mask, float("-inf"))
            g = x @ x.transpose(-1, -2) + bias
            y: Tensor = torch.softmax(h, -1) @ x + torch.softmax(g, -1) @ x
            return y

    x = torch.randn(2, 4, 8, requires_grad=True)
    mask = torch.ones(4, 4, dtype=torch.bool).triu(1)
    bias = torch.zeros(4, 4).masked_fill(mask, float("-inf"))
    graph = capture(Masked(), (x, mask, bias)).graph
    outcome, _ = _applied(graph)
    assert [r for _, r in reasons(outcome)].count("mask") == 1
    assert [r for _, r in reasons(outcome)].count("inside-softmax") == 1


def test_probabilities_of_a_loss_stay_float32() -> None:
    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 1)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return F.binary_cross_entropy(torch.sigmoid(self.head(x)), y)

    graph = _graph(Loss(), torch.randn(8, 4), torch.ones(8, 1))
    Flexpoint().apply(graph, PassContext(running="flexpoint"))
    (loss,) = [n for n in graph.operators if operator_name(n).endswith("cross_entropy.default")]
    assert operator_name(loss.all_input_nodes[0]) == "aten.sigmoid.default"


def test_other_types_are_left_alone() -> None:
    class Mixed(nn.Module):
        def forward(self, x: Tensor, i: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            return x.double() * 2, i + 1, torch.view_as_complex(x.view(-1, 2)) * 1j

    graph = _graph(Mixed(), torch.randn(4, 2, requires_grad=True), torch.arange(3))
    outcome, _ = _applied(graph)
    assert {"x", "tangent_0"} >= {a.site for a in outcome.applied} - {"activations"} - {
        n.name for n in graph.operators
    }
    kinds = {value_of(n).dtype for n in graph.operators if isinstance(value_of(n), Tensor)}
    assert kinds >= {torch.float64, torch.int64, torch.complex64}


def test_a_model_in_double_precision_is_declined() -> None:
    graph = _graph(nn.Linear(3, 2).double(), torch.randn(4, 3, dtype=torch.float64))
    outcome = Flexpoint().apply(graph, PassContext(running="flexpoint"))
    assert reasons(outcome) == [("graph", "no-float32")]
    assert outcome.part is None


def test_a_model_in_half_precision_is_declined() -> None:
    model = nn.Linear(4, 2).half()
    graph = _graph(model, torch.randn(3, 4).half())
    text = print_graph(graph)
    outcome = Flexpoint().apply(graph, PassContext(running="flexpoint"))
    assert reasons(outcome) == [("graph", "lowered-already")]
    assert print_graph(graph) == text


def test_averages_of_a_pooling_get_an_exponent_and_maxima_do_not() -> None:
    for pool, count in ((nn.MaxPool2d(2), 0), (nn.AvgPool2d(2), 2), (nn.MaxPool2d(3, 1), 1)):
        x = torch.randn(2, 2, 6, 6, requires_grad=True)
        outcome, _ = _applied(capture(nn.Sequential(pool), (x,)).graph)
        sites = [a.site for a in outcome.applied if "pool" in a.site]
        assert len(sites) == count, pool


# -- what the backward keeps -----------------------------------------------------------------------


def test_saved_activations_halve() -> None:
    graph = _graph(conv_net(), torch.randn(64, 3, 8, 8))
    before = graph.get(liveness).saved
    outcome, _ = _applied(graph)
    after = graph.get(liveness).saved
    wide = sum(b for n, b in before.items() if value_of(n).dtype is torch.float32)
    narrow = sum(b for n, b in after.items() if value_of(n).dtype is torch.int16)
    assert wide > 100_000
    assert narrow <= wide / 2
    left = [n for n in after if value_of(n).dtype is torch.float32]
    assert all(value_of(n).dim() <= 1 for n in left)  # statistics of the norm
    (saved,) = [a.numbers for a in outcome.applied if a.site == "activations"]
    assert saved["after"] == sum(after.values())
    assert int(saved["after"]) < 0.6 * int(saved["before"])


def test_weights_and_inputs_are_rounded_again_instead_of_saved() -> None:
    graph = _graph(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), torch.randn(4, 8))
    _applied(graph)
    saved = {value_of(n).shape for n in graph.get(liveness).saved}
    assert (8, 8) not in {tuple(s) for s in saved}
    again = [
        n.args[0]
        for n in graph.operators
        if "flex_round" in operator_name(n)
        and phase_of(n) is Phase.BACKWARD
        and n.args[0] in graph.inputs
    ]
    slots = {str(graph.slot(n).role) for n in again}  # type: ignore[arg-type]
    assert slots == {"param", "input", "tangent"}


def test_what_is_recomputed_is_not_saved() -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            def inner(h: Tensor) -> Tensor:
                return torch.tanh(self.two(torch.tanh(h)))

            y: Tensor = checkpoint(inner, self.one(x), use_reentrant=False)
            return y

    graph = _graph(Checkpointed(), torch.randn(64, 8))
    before = graph.get(liveness).saved_bytes
    _applied(graph)
    rows = [n for n in graph.get(liveness).saved if value_of(n).numel() >= 512]
    assert len(rows) <= 1
    assert graph.get(liveness).saved_bytes <= before + 600


def test_an_inference_graph_has_no_state() -> None:
    model = conv_net().eval()
    with torch.no_grad():
        graph = capture(model, (torch.randn(2, 3, 8, 8),)).graph
    outcome, _ = _applied(graph)
    assert outcome.part is None
    assert not graph.signature.names(Role.STATE)
    assert not graph.signature.names(Role.AUX)
    assert _count(graph, "flex_round") > 8


def test_the_key_is_that_of_the_model_and_not_of_the_batch() -> None:
    def key(model: nn.Module, size: int) -> str:
        part = _applied(_graph(model, torch.randn(size, 3, 8, 8)))[0].part
        assert isinstance(part, FlexTensors)
        return part.key

    model = conv_net()
    assert key(model, 4) == key(model, 8)
    assert key(model, 4) != key(nn.Sequential(nn.Conv2d(3, 2, 3)), 4)


# -- facts and options -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "first", "second"),
    [
        ("precision,flexpoint", "flexpoint", "precision"),
        ("flexpoint,precision", "precision", "flexpoint"),
        ("flexpoint,kfac", "kfac", "flexpoint"),
        ("group_gradients,flexpoint", "flexpoint", "group_gradients"),
        ("schedule,flexpoint", "flexpoint", "schedule"),
        ("flexpoint,flexpoint", "flexpoint", "flexpoint"),
    ],
)
def test_orders_that_do_not_work(spec: str, first: str, second: str) -> None:
    with pytest.raises(PipelineError, match=f"{first!r} must run before {second!r}"):
        Pipeline.parse(spec)


def test_the_order_that_works() -> None:
    spec = "cleanup,kfac,flexpoint,schedule,group_gradients"
    assert str(Pipeline.parse(spec)) == spec


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mantissa": 17}, "flexpoint: mantissa=17 is not a number of bits from 8 to 16"),
        ({"mantissa": 7}, "flexpoint: mantissa=7 is not a number of bits from 8 to 16"),
        ({"exponent": 0}, "flexpoint: exponent=0 is not a number of bits from 1 to 8"),
        ({"exponent": 9}, "flexpoint: exponent=9 is not a number of bits from 1 to 8"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError) as error:
        Flexpoint(**options)
    assert error.value.message == message


def test_the_bound_follows_the_mantissa() -> None:
    assert Flexpoint().numerics.bound == 2**-6
    assert Flexpoint(mantissa=12).numerics.bound == 2**-2
    assert Flexpoint(master_weights=False).numerics.kind == "algorithm"


def test_kfac_keeps_its_statistics() -> None:
    graph = _graph(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4)), torch.randn(16, 8))
    steps = Pipeline.parse("cleanup,kfac,flexpoint").run(graph, PassContext(), verify="full")
    part = steps[2].outcome.part
    assert isinstance(part, FlexTensors)
    assert "aside" in {d.reason for d in steps[2].outcome.declined}
    outputs = dict(zip(graph.signature.outputs, graph.outputs, strict=True))
    moments = [n for s, n in outputs.items() if s.role is Role.AUX and s.name.startswith("kfac/")]
    assert len(moments) == 4
    assert not any(
        "flex" in operator_name(n.all_input_nodes[0]) for n in moments if n.name in targets(graph)
    )
    wide = [n for n in graph.get(liveness).saved if value_of(n).dtype is torch.float32]
    assert not wide
