"""The pass `kfac` without its runtime: its text, what it decides, declines and refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.capture import capture
from graphopt.errors import ArgumentError
from graphopt.graph import Graph
from graphopt.passbase import Outcome, PassContext
from graphopt.passes.kfac import Kfac
from graphopt.pipeline import Pipeline
from graphopt.plan import Plan, Role
from graphopt.plan.kfac import DIAGONAL, Block, Curvature
from graphopt.testing import inputs_for, run_graph
from graphopt.text import parse_graph, print_graph
from graphopt.verify import verify

GOLDEN = Path(__file__).parents[1] / "golden"


def _applied(graph: Graph, **options: object) -> Outcome:
    outcome = Kfac(**options).apply(graph, PassContext())  # type: ignore[arg-type]
    verify(graph, full=True)
    return outcome


def _captured(model: nn.Module, *inputs: Tensor) -> Graph:
    return capture(model, inputs, {}).graph


def _blocks(outcome: Outcome) -> dict[str, Block]:
    assert isinstance(outcome.part, Curvature)
    return {block.weight: block for block in outcome.part.blocks}


def test_golden() -> None:
    graph = parse_graph((GOLDEN / "schedule.before.gopt").read_text())
    outcome = _applied(graph)
    assert outcome.changed
    text = print_graph(graph)
    assert text == (GOLDEN / "kfac.after.gopt").read_text()
    assert print_graph(parse_graph(text)) == text


def test_step_is_as_it_was() -> None:
    graph = parse_graph((GOLDEN / "schedule.before.gopt").read_text())
    inputs = inputs_for(graph)
    before = run_graph(graph, inputs)
    _applied(graph)
    after = run_graph(graph, inputs)
    slots = graph.signature.outputs
    kept = [v for s, v in zip(slots, after, strict=True) if s.role is not Role.AUX]
    assert len(kept) == len(before)
    assert all(torch.equal(a, b) for a, b in zip(before, kept, strict=True))


def test_plan_is_data() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    plan = graphopt.optimize(model, (torch.randn(2, 3),), passes="kfac{damping=0.01}", dry_run=True)
    assert isinstance(plan, Plan)
    curvature = plan.part(Curvature)
    assert curvature is not None
    assert Plan.from_json(plan.to_json()) == plan
    assert curvature.damping == 0.01
    assert [b.bias for b in curvature.blocks] == ["0.bias", "2.bias"]


class Experts(nn.Module):
    """One weight per expert, as a batch of matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4, 2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(x, self.weight)


def test_batch_of_weights_has_a_block_for_each() -> None:
    graph = _captured(Experts(), torch.randn(3, 5, 4))
    block = _blocks(_applied(graph))["weight"]
    assert (block.groups, block.rows, block.columns, block.layout) == (3, 2, 4, "in-out")


class Sliced(nn.Module):
    """Two halves of one weight, used apart."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.weight[:4].t()) @ self.weight[4:].t()


def test_slices_of_a_weight_are_blocks_of_their_own() -> None:
    graph = _captured(Sliced(), torch.randn(5, 4))
    outcome = _applied(graph)
    assert isinstance(outcome.part, Curvature)
    found = sorted((b.start, b.rows, b.columns) for b in outcome.part.blocks)
    assert found == [(0, 4, 4), (4, 2, 4)]
    assert not outcome.declined


@pytest.mark.parametrize(("max_dim", "form"), [(2, "dense"), (3, "dense"), (1, DIAGONAL)])
def test_oversized_sides_are_cut_or_diagonal(max_dim: int, form: str) -> None:
    graph = _captured(nn.Linear(67, 6, bias=False), torch.randn(5, 67))
    block = _blocks(_applied(graph, max_dim=max_dim))["weight"]
    assert block.right is not None
    assert block.right.form == DIAGONAL
    assert block.left.size * block.left.blocks == 6
    assert block.left.size <= max_dim or form == DIAGONAL


class Unusual(nn.Module):
    """A weight whose gradient is no product of two matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.gains = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) @ self.gains.tril().cumsum(0)


def test_unsupported_operator_is_listed_and_keeps_its_plain_gradient() -> None:
    model = Unusual().double()
    x = torch.randn(5, 4, dtype=torch.float64)
    model(x).square().mean().backward()
    assert model.gains.grad is not None
    assert model.layer.weight.grad is not None
    plain, other = model.gains.grad.clone(), model.layer.weight.grad.clone()
    model.zero_grad()
    graphopt.optimize(model, passes="kfac", backend="eager")
    model(x).square().mean().backward()
    assert torch.equal(model.gains.grad, plain)
    assert not torch.allclose(model.layer.weight.grad, other)
    text = model.explain()  # type: ignore[operator]
    assert "gains" in text
    assert "its gradient comes from" in text


def test_every_parameter_is_listed_once() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
    outcome = _applied(_captured(model, torch.randn(2, 1, 5, 5)))
    listed = [item.site for item in (*outcome.applied, *outcome.declined)]
    assert sorted(listed) == sorted(name for name, _ in model.named_parameters())


def test_frozen_parameters_are_no_sites() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    outcome = _applied(_captured(model, torch.randn(5, 3)))
    assert {item.site for item in outcome.applied} == {"1.weight", "1.bias"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"damping": 0.0}, "damping=0 is not positive"),
        ({"damping": -1.0}, "damping=-1 is not positive"),
        ({"damping": float("nan")}, "damping=nan is not positive"),
        ({"interval": 0}, "interval=0 is not a number of steps"),
        ({"ema": 1.0}, r"ema=1 is not in \[0, 1\)"),
        ({"max_dim": 0}, "max_dim=0 is not a size"),
        ({"fraction": 2.0}, r"fraction=2 is not in \[0, 1\]"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        Kfac(**options)  # type: ignore[arg-type]


def test_gradients_are_grouped_after_they_were_tapped() -> None:
    assert str(Pipeline.parse("cleanup,kfac,group_gradients")) == "cleanup,kfac,group_gradients"
    with pytest.raises(graphopt.GraphoptError, match="kfac"):
        Pipeline.parse("group_gradients,kfac")
