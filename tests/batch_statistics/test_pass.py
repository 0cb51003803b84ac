"""The pass: on generated graphs, as text, what it declines, and what is no use of it."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import graphopt
from graphopt.capture import capture
from graphopt.errors import ArgumentError, PipelineError, SpecError
from graphopt.graph import Graph
from graphopt.passbase import Outcome, PassContext
from graphopt.passes.batch_statistics import BatchStatistics
from graphopt.passes.cleanup import Cleanup
from graphopt.pipeline import Pipeline
from graphopt.plan import Role
from graphopt.plan.batch_statistics import Norms, Statistic
from graphopt.runtime.batch_statistics.moments import Layout, Taking
from graphopt.testing import check_pass, inputs_for, joint_graphs, run_graph
from graphopt.text import parse_graph, print_graph
from graphopt.verify import verify
from tests.batch_statistics.models import batch, net
from tests.support.applying import GOLDEN, reasons

KINDS = ["batch_norm", "batch_norm", "linear", "convolution", "unary", "running_average"]


def test_generated_graphs() -> None:
    check_pass(BatchStatistics(last=2), graphs=joint_graphs(kinds=KINDS), max_examples=30)
    symbolic = joint_graphs(kinds=KINDS[:1], max_steps=3, symbolic=True)
    check_pass(BatchStatistics(last=2), graphs=symbolic, max_examples=8)


def _seen(graph: Graph, inputs: list[Tensor]) -> dict[fx.Node, Tensor]:
    """The operand of every batch norm in training, when the graph runs."""
    found: dict[fx.Node, Tensor] = {}

    class Watching(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            if "batch_norm" in n.name and "backward" not in n.name and n.op == "call_function":
                found[n] = self.fetch_args_kwargs_from_env(n)[0][0].clone()
            return super().run_node(n)

    Watching(graph.module).run(*(value.clone() for value in inputs))
    return found


@pytest.mark.hypothesis  # examples are generated within
def test_moments_are_those_of_what_each_norm_sees() -> None:
    norms = 0

    @settings(max_examples=30, deadline=None)
    @given(graph=joint_graphs(kinds=KINDS), seed=st.integers(0, 3))
    def property_holds(graph: Graph, seed: int) -> None:
        nonlocal norms
        inputs = inputs_for(graph, seed)
        before = run_graph(graph, inputs)
        part = BatchStatistics().apply(graph, PassContext()).part
        verify(graph, full=True)
        text = print_graph(graph)
        assert print_graph(parse_graph(text)) == text
        if part is None:
            return
        assert isinstance(part, Norms)
        slots, after = graph.signature.outputs, run_graph(graph, inputs)
        own = [(s, n, v) for s, n, v in zip(slots, graph.outputs, after, strict=True)]
        kept = [value for slot, _, value in own if slot.role is not Role.AUX]
        assert all(torch.equal(a, b) for a, b in zip(before, kept, strict=True))
        found = [(Statistic.of(slot), node, value) for slot, node, value in own]
        mine = [(s, node, value) for s, node, value in found if s is not None]
        layout = Layout(part.norms)
        moments = Taking(layout, [s for s, _, _ in mine])([value for _, _, value in mine])
        statistics = layout.statistics(moments)
        seen = _seen(graph, inputs)
        for number, norm in enumerate(part.norms):
            sources = {cast("fx.Node", node.args[0]) for s, node, _ in mine if s.norm == norm.mean}
            whole = torch.cat([seen[n].transpose(0, 1).flatten(1) for n in sources], 1).double()
            var, mean = torch.var_mean(whole, 1)
            scale = (var + norm.eps[0]).sqrt() + mean.abs()
            assert ((statistics[2 * number] - mean).abs() <= 1e-5 * scale).all()
            assert ((statistics[2 * number + 1] - var).abs() <= 1e-5 * scale.square()).all()
            norms += 1

    property_holds()
    assert norms >= 20


def test_golden() -> None:
    graph = parse_graph((GOLDEN / "batch_statistics.before.gopt").read_text())
    inputs = inputs_for(graph)
    expected = run_graph(graph, inputs)
    BatchStatistics(last=4).apply(graph, PassContext())
    verify(graph, full=True)
    assert print_graph(graph) == (GOLDEN / "batch_statistics.after.gopt").read_text()
    found = zip(graph.signature.outputs, run_graph(graph, inputs), strict=True)
    kept = [value for slot, value in found if slot.role is not Role.AUX]
    assert all(torch.equal(a, b) for a, b in zip(expected, kept, strict=True))


def _outcome(model: nn.Module, *inputs: Tensor, clean: bool = False) -> Outcome:
    graph = capture(model, inputs).graph
    if clean:
        Cleanup().apply(graph, PassContext())
    outcome = BatchStatistics().apply(graph, PassContext())
    verify(graph, full=True)
    return outcome


@pytest.mark.parametrize("clean", [False, True])
def test_what_it_says_of_what_it_does(clean: bool) -> None:
    outcome = _outcome(net(), batch(0), clean=clean)
    assert reasons(outcome) == []
    found = [(item.site, dict(item.numbers)) for item in outcome.applied]
    assert found == [
        ("image", {"values per channel": 6 * 4 * 4, "momentum": 0.3}),
        ("cumulative", {"values per channel": 6, "momentum": "none"}),
        ("twice", {"values per channel": 12, "momentum": 0.1}),
    ]
    assert outcome.applied[0].what.startswith("evaluates with the statistics of the last step,")


# -- what it declines ------------------------------------------------------------------------------


def _frozen() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.BatchNorm1d(4))
    model[1].eval()
    return model


class _Reads(nn.Module):
    """Training that looks at its running statistics."""

    def __init__(self, what: str, use: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.head, self.norm = nn.Linear(3, 4), nn.BatchNorm1d(4)
        self.what, self.use = what, use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self.norm(self.head(x)), getattr(self.norm, self.what))


class _Given(nn.Module):
    """Running statistics that the caller keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 4)

    def forward(self, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        return F.batch_norm(self.head(x), mean, var, training=True)


class _Low(nn.Module):
    """Calls the operator itself; the module refuses an epsilon of 0."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm
        stats = n.running_mean, n.running_var
        return torch.batch_norm(x, n.weight, n.bias, *stats, True, 0.1, 0.0, False)


X = torch.linspace(-1, 1, 24).reshape(8, 3)
STATISTICS = torch.zeros(4), torch.ones(4)


@pytest.mark.parametrize(
    ("model", "inputs", "expected"),
    [
        (_frozen(), (X,), [("1", "frozen")]),
        (
            nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False)),
            (X,),
            [("1", "no-running-statistics")],
        ),
        (_Low(), (X,), [("norm", "no-epsilon")]),
        (_Reads("running_mean", operator.add), (X,), [("norm", "statistics-read")]),
        (_Reads("running_var", torch.maximum), (X,), [("norm", "statistics-read")]),
        (_Given(), (X, *STATISTICS), [("model", "not-a-buffer")]),
        (nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)), (X,), [("model", "no-batch-norm")]),
    ],
    ids=lambda value: value[0][1] if isinstance(value, list) else "",
)
def test_what_is_left_alone_says_why(
    model: nn.Module, inputs: tuple[Tensor, ...], expected: list[tuple[str, str]]
) -> None:
    outcome = _outcome(model, *inputs)
    found = reasons(outcome)
    if expected[0][1] == "not-a-buffer":  # it is no module's: named by its operator
        found = [("model", reason) for _, reason in found]
    assert found == expected
    frozen = expected[0][1] == "frozen"
    assert [item.site for item in outcome.applied] == (["3"] if frozen else [])
    assert all(item.detail for item in outcome.declined)


def test_a_model_without_batch_norms_trains_as_it_is_and_says_so() -> None:
    model: Any = nn.Sequential(nn.Linear(3, 2))
    graphopt.optimize(model, passes="batch_statistics", backend="eager")
    model(X).sum().backward()
    assert "no-batch-norm" in model.explain()
    assert graphopt.state_dict(model) == {}


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize("last", [0, -1])
def test_no_number_of_steps(last: int) -> None:
    with pytest.raises(ArgumentError, match=f"last={last} is not a number of steps"):
        BatchStatistics(last=last)
    with pytest.raises(SpecError, match=f"last={last} is not a number of steps") as caught:
        Pipeline.parse(f"batch_statistics{{last={last}}}")
    assert "leave it out" in caught.value.hint


@pytest.mark.parametrize(
    "spec",
    [
        "batch_statistics,batch_statistics",
        "precision,batch_statistics",
        "partition,batch_statistics",
    ],
)
def test_order(spec: str) -> None:
    with pytest.raises(PipelineError, match="batch_statistics"):
        Pipeline.parse(spec)


def test_steps_in_stages_are_refused() -> None:
    from graphopt.runtime.batch_statistics import BatchStatistics as Part
    from graphopt.runtime.session import Session

    assert "ranks of others" in Part(Session()).unstaged(Norms((), 1), 1)
