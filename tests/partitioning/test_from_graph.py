"""Problems read from captured steps: every time counts once, and gradients flow backwards."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from graphopt.analysis.gradient_order import roofline
from graphopt.analysis.liveness import liveness
from graphopt.capture import capture
from graphopt.errors import ArgumentError
from graphopt.graph import Graph, Level, phase_of
from graphopt.partitioning.atoms import atoms_of
from graphopt.partitioning.downsets import downsets
from graphopt.partitioning.evaluate import evaluate
from graphopt.partitioning.forward_side import ForwardSide
from graphopt.partitioning.from_graph import from_graph
from graphopt.partitioning.objective import Objective
from graphopt.partitioning.planner import plan
from graphopt.partitioning.problem import Link, Problem
from graphopt.partitioning.twins import twins, weight_side
from graphopt.plan import Phase
from graphopt.testing.corpus import CORPUS
from graphopt.testing.inputs import inputs_for
from graphopt.testing.program import Instruction, Program, build
from graphopt.testing.strategies import joint_graphs
from graphopt.text import parse_graph
from tests.support.captures import captured
from tests.support.stages import assert_same_step


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.bn(self.conv1(x))))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.middle = nn.Linear(8, 8)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.middle(self.embed(tokens))))


def _net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), Block(4), Block(4), nn.Flatten(), nn.Linear(4 * 36, 5)
    )


def _graph(model: nn.Module, *args: Tensor) -> Graph:
    return capture(model, args).graph


def _check_gradients_flow_backwards(graph: Graph, problem: Problem) -> None:
    """In no partition may an earlier stage compute a gradient that a later one reads."""
    atoms = atoms_of(problem)
    atom = {o: a for a, members in enumerate(atoms.members) for o in members}
    needs = [1 << a for a in range(len(atoms))]
    for a, before in enumerate(atoms.before):
        for b in range(a):
            if before >> b & 1:
                needs[a] |= needs[b]
    twin = twins(graph, ForwardSide(graph))
    own = weight_side(graph, twin)
    assert list(twin) == [n for n in graph.operators if phase_of(n) is Phase.BACKWARD]
    for node, reader in twin.items():
        if node.target is torch.ops.aten.add.Tensor:
            continue  # gradients of independent readers add up in the earliest of their stages
        for source in node.all_input_nodes:
            if source in twin and source not in own:
                maker, reads = atom[twin[source]], atom[reader]
                assert needs[maker] >> reads & 1, f"{source} is read by {node}"


def test_the_gradient_of_an_input_that_two_independent_operators_read() -> None:
    """Its sum belongs to neither of them, so every order of the two can be cut."""
    steps = tuple(Instruction(kind, ()) for kind in ("expand", "unary", "cross_entropy"))
    graph = build(Program(steps, ((2, 3),), (0, 1), input_grads=False), Level.JOINT)
    problem = from_graph(graph)
    _check_gradients_flow_backwards(graph, problem)
    first, second = (o.name for o in problem.operators[:2])
    for assignment in ({first: 0, second: 1}, {first: 1, second: 0}):
        rest = {o.name: assignment[second] for o in problem.operators[2:]}
        assert_same_step(graph, inputs_for(graph), {**assignment, **rest})


def _check_times(graph: Graph, problem: Problem) -> None:
    assert problem.seconds == pytest.approx(math.fsum(roofline(graph).values()))


@given(joint_graphs())
@settings(max_examples=60, deadline=None)
def test_generated_steps(graph: Graph) -> None:
    if not any(phase_of(n) is Phase.FORWARD for n in graph.operators):
        return
    problem = from_graph(graph)
    _check_times(graph, problem)
    _check_gradients_flow_backwards(graph, problem)
    stages = min(2, len(atoms_of(problem)))
    assert len(plan(problem, stages, bound_seconds=0.0).stages) == stages


@pytest.mark.corpus
@pytest.mark.parametrize("name", list(CORPUS))
def test_corpus(name: str) -> None:
    graph, _ = captured(name)
    problem = from_graph(graph)
    if name != "checkpointed":  # whose recomputed operators count twice
        _check_times(graph, problem)
    _check_gradients_flow_backwards(graph, problem)
    (whole,) = plan(problem, 1, bound_seconds=0.0).stages
    inputs = sum(v.bytes for v in problem.values if v.saved_by and not v.maker)
    assert whole.saved - inputs == liveness(graph).saved_bytes
    found = plan(problem, min(3, len(atoms_of(problem))), bound_seconds=0.0)
    assert found.certificate is not None
    assert found.certificate.gap < 0.05 or len(problem.operators) < 20


def test_a_residual_network() -> None:
    problem = from_graph(_graph(_net(), torch.randn(2, 3, 6, 6)))
    names = [o.module for o in problem.operators if o.layer]
    assert names == ["0", "1.conv1", "1.bn", "1.conv2", "2.conv1", "2.bn", "2.conv2", "4"]
    by_module = {o.module: o for o in problem.operators if o.layer}
    # The first layer's input needs no gradient; a convolution's backward counts half and half.
    assert by_module["0"].input_grad == 0.0
    assert by_module["0"].weight_grad > 0.0
    assert by_module["1.conv1"].input_grad == by_module["1.conv1"].weight_grad > 0.0
    assert by_module["4"].weight_grad > 0.0
    # Counters of batches go with their norm, so that the graph is almost a chain.
    found = downsets(atoms_of(problem))
    assert found is not None
    assert len(found) < 2 * len(problem.operators)
    found_stages = plan(problem, 4).stages
    assert {p for s in found_stages for p in s.parameters} >= {"1.bn.weight", "1.bn.running_mean"}
    together = plan(problem, 4).assignment
    for group in problem.together:
        assert len({together[name] for name in group}) == 1


def test_what_crosses_a_cut_in_a_block() -> None:
    """Behind the first convolution of a block: its output, and the block's input for the sum."""
    problem = from_graph(_graph(_net(), torch.randn(2, 3, 6, 6)), link=Link(1e-9, 0.0))
    size = 2 * 4 * 6 * 6 * 4
    first = [o.name for o in problem.operators if o.module in ("0", "1.conv1")]
    assignment = [0 if o.name in first else 1 for o in problem.operators]
    counters = {o.name for o in problem.operators if o.module == "1.bn"}
    assert counters.isdisjoint(first)
    (cut,) = evaluate(problem, assignment, Objective()).cuts
    assert len(cut.values) == 2
    assert (cut.bytes, cut.gradient) == (2 * size, 2 * size)
    assert cut.forward == pytest.approx(2 * size * 1e-9)


def test_saved_activations_are_counted_once_per_stage() -> None:
    """ReLU saves its output, and so does the convolution that reads it."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1))
    problem = from_graph(_graph(model, torch.randn(2, 3, 6, 6)))
    (relu,) = (v for v in problem.values if v.maker == "relu")
    assert set(relu.saved_by) == {"relu", "convolution_1"}
    size, given = 2 * 4 * 6 * 6 * 4, 2 * 3 * 6 * 6 * 4
    one, two = plan(problem, 1), plan(problem, 2)
    assert one.stages[0].saved == size + given
    assert sum(s.saved for s in two.stages) in (size + given, 2 * size + given)


def test_tied_weights_are_one_parameter_of_two_operators() -> None:
    problem = from_graph(_graph(Tied(), torch.randint(0, 20, (2, 3))))
    users = [o.name for o in problem.operators if "embed.weight" in o.parameters]
    assert len(users) == 2
    (shared,) = plan(problem, 2).shared
    assert (shared.name, shared.stages) == ("embed.weight", (0, 1))
    # The product for the head's weight is not on the way to earlier layers.
    head = next(o for o in problem.operators if o.module == "head")
    assert head.weight_grad > 0.0


def test_checkpointed_operators_run_again_in_backward() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

        def _behind(self, x: Tensor) -> Tensor:
            return torch.tanh(self.second(x))

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(
                lambda y: torch.tanh(self.second(y)), self.first(x), use_reentrant=False
            )

    graph = _graph(Model(), torch.randn(4, 6))
    problem = from_graph(graph)
    assert problem.seconds > math.fsum(roofline(graph).values())
    tanh = next(v for v in problem.values if v.maker == "tanh")
    assert tanh.saved_by == ()


def test_views_and_in_place_operators_stay_with_what_they_share_memory_with() -> None:
    class Model(nn.Module):
        def forward(self, x: Tensor, w: Tensor) -> Tensor:
            y = (x @ w).view(2, 3, 4).transpose(1, 2)
            return F.dropout(torch.sin(y), 0.5)

    problem = from_graph(_graph(Model(), torch.randn(2, 6), torch.randn(6, 12)))
    assert [o.name for o in problem.operators] == ["mm", "sin", "native_dropout"]
    # Captures have no in-place operators, and passes may write some.
    graph = parse_graph(WRITTEN)
    problem = from_graph(graph)
    assert [o.name for o in problem.operators] == ["mm", "sin"]
    assert {n.name: i for n, i in ForwardSide(graph).host.items()} == {
        **{"mm": 0, "view": 0, "relu_": 0},
        "sin": 1,
    }
    (value,) = (v for v in problem.values if v.maker == "mm")
    assert (value.readers, value.bytes) == (("sin",), 24)


WRITTEN = """gopt 1 inference torch 2.13

forward inputs
  %x = input "x" : f32[2,3]
  %w = param "w" : f32[3,3]

forward
  %mm = aten.mm.default(%x, %w) : f32[2,3]
  %view = aten.view.default(%mm, [3, 2]) : f32[3,2]
  %relu_ = aten.relu_.default(%view) : f32[3,2]
  %sin = aten.sin.default(%relu_) : f32[3,2]

forward outputs
  output "0" = %sin

end
"""


def test_given_times_and_an_operator_without_one() -> None:
    graph = _graph(_net(), torch.randn(2, 3, 6, 6))
    seconds = dict.fromkeys(graph.operators, 1.0)
    problem = from_graph(graph, seconds)
    assert problem.times == "measured"
    # A view of a parameter belongs to no operator: whoever reads it makes it.
    of_parameters = [n for n in graph.operators if n.name == "t"]
    assert problem.seconds == len(seconds) - len(of_parameters) == len(seconds) - 1
    first = next(iter(graph.operators))
    del seconds[first]
    with pytest.raises(ArgumentError) as caught:
        from_graph(graph, seconds)
    assert caught.value.message == f"operator {first.name!r} has no time"


def test_a_forward_graph_is_refused() -> None:
    graph = _graph(nn.Linear(2, 2), torch.randn(1, 2))
    with pytest.raises(ArgumentError) as caught:
        from_graph(Graph(graph.module, graph.signature, Level.FORWARD))
    assert caught.value.message == "stages are cut from a joint or an inference graph"
