"""A step in stages gives the bits of the whole, and only neighbours talk."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from graphopt.analysis.aliasing import storage
from graphopt.analysis.effects import Effect, effect_of
from graphopt.capture import capture
from graphopt.errors import ArgumentError
from graphopt.graph import Graph, phase_of
from graphopt.partitioning.atoms import atoms_of
from graphopt.partitioning.execute import Executor
from graphopt.partitioning.from_graph import from_graph
from graphopt.partitioning.place import place
from graphopt.partitioning.planner import plan
from graphopt.partitioning.route import Routes
from graphopt.partitioning.split import Kind, Split, in_two
from graphopt.plan import Phase, Role
from graphopt.schedules.generate import generate, interleaved
from graphopt.schedules.transfers import with_transfers
from graphopt.testing import CORPUS, inputs_for, joint_graphs
from graphopt.text import parse_graph
from tests.support.captures import captured
from tests.support.stages import (
    assert_same_step,
    by_role,
    outputs_of,
    random_stages,
    run_stages,
    split_graph,
)

KINDS = ("1f1b", "gpipe", "zero_bubble", "no_flush")


class Skips(nn.Module):
    """The first layer is read by all others."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        a = torch.tanh(self.first(x))
        b = torch.tanh(self.second(a))
        return torch.tanh(self.third(b)) + a


class Tied(nn.Module):
    """One weight in the first, the middle and the last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 6)
        self.middle = nn.Linear(6, 12)
        self.head = nn.Linear(6, 12, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = torch.tanh(self.middle(self.embed(tokens)))
        return self.head(torch.tanh(hidden @ self.embed.weight))


def _step(model: nn.Module, *args: Tensor) -> tuple[Graph, list[Tensor]]:
    graph = capture(model, args).graph
    return graph, inputs_for(graph)


def _by_module(graph: Graph, stages: dict[str, int]) -> dict[str, int]:
    """Stages by the names of modules; operators of the root go with what is before them."""
    result, last = {}, 0
    for operator in from_graph(graph).operators:
        last = stages.get(operator.module, last)
        result[operator.name] = last
    return result


@given(joint_graphs(), st.integers(0, 1000), st.integers(2, 4), st.sampled_from(KINDS))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
def test_generated_steps_at_random_cuts(graph: Graph, seed: int, stages: int, kind: str) -> None:
    assume(any(phase_of(n) is Phase.FORWARD for n in graph.operators))
    problem = from_graph(graph)
    assume(len(atoms_of(problem)) >= stages)
    assert_same_step(graph, inputs_for(graph), random_stages(problem, stages, seed), kind)


@pytest.mark.corpus
@pytest.mark.parametrize("name", list(CORPUS))
def test_corpus_in_two_three_and_four_stages(name: str) -> None:
    """At random cuts and at the planner's."""
    graph, inputs = captured(name)
    problem = from_graph(graph)
    for stages, kind in zip((2, 3, 4), KINDS, strict=False):
        if len(atoms_of(problem)) < stages:
            continue
        assert_same_step(graph, inputs, random_stages(problem, stages, seed=stages), kind)
        assert_same_step(graph, inputs, plan(problem, stages, bound_seconds=0.0).assignment)


def test_every_operator_runs_in_one_half_and_halves_talk_to_neighbours() -> None:
    graph, _ = _step(Skips(), torch.randn(2, 6))
    found = split_graph(graph, _by_module(graph, {"first": 0, "second": 1, "third": 2}))
    own = [n for n in graph.operators if n not in graph.get(storage).views]
    for phase, halves in ((Phase.FORWARD, found.forward), (Phase.BACKWARD, found.backward)):
        inside = [
            {n.name for n in half.module.graph.nodes if n.op != "placeholder"} for half in halves
        ]
        for node in own:
            assert sum(node.name in names for names in inside) == (phase_of(node) is phase)
        step = 1 if phase is Phase.FORWARD else -1
        for stage, half in enumerate(halves):
            wanted = {p.name for p in half.inputs if p.kind is Kind.RECEIVED}
            before = stage - step
            sent = halves[before].outputs if 0 <= before < len(halves) else ()
            assert wanted == {p.name for p in sent if p.kind is Kind.SENT}


def test_a_skip_is_relayed_by_the_stage_between() -> None:
    graph, inputs = _step(Skips(), torch.randn(2, 6))
    stages = _by_module(graph, {"first": 0, "second": 1, "third": 2})
    found = assert_same_step(graph, inputs, stages)
    there = next(c for c in found.crossings if c.node.name == "tanh" and c.phase is Phase.FORWARD)
    assert (there.made, there.read, there.relayed) == (0, (1, 2), ())
    middle = found.forward[1]
    assert {p.name for p in middle.outputs if p.kind is Kind.SENT} == {"tanh", "tanh_1"}
    # Its gradient from the last stage is passed on by the middle one, as it came.
    back = [c for c in found.crossings if c.phase is Phase.BACKWARD]
    assert [(c.node.name, c.made, c.read) for c in back] == [
        ("tangent_0", 2, (1,)),  # of the sum, which is added to what the middle stage gives
        ("mm", 2, (1,)),
        ("add_1", 1, (0,)),
    ]


def test_a_value_that_only_the_ends_read_is_relayed() -> None:
    class Longer(Skips):
        def forward(self, x: Tensor) -> Tensor:
            a = torch.tanh(self.first(x))
            return torch.tanh(self.third(torch.tanh(self.second(x)))) + a

    graph, inputs = _step(Longer(), torch.randn(2, 6))
    stages = _by_module(graph, {"first": 0, "second": 1, "third": 2})
    found = assert_same_step(graph, inputs, stages)
    crossings = {(c.node.name, c.phase): (c.made, c.read, c.relayed) for c in found.crossings}
    assert crossings["tanh", Phase.FORWARD] == (0, (2,), (1,))
    assert crossings["tangent_0", Phase.BACKWARD] == (2, (0,), (1,))
    relay = found.backward[1].module.graph
    assert not next(
        n for n in relay.find_nodes(op="placeholder") if n.name == "tangent_0"
    ).users.keys() - {relay.output_node()}


def test_gradients_of_one_value_are_added_up_before_they_travel() -> None:
    """Behind a residual sum one value crosses, so one gradient comes back."""

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            a = torch.tanh(self.first(x)) + x
            return a + torch.tanh(self.second(a))

    graph, inputs = _step(Residual(), torch.randn(2, 6))
    found = assert_same_step(graph, inputs, _by_module(graph, {"first": 0, "second": 1}))
    assert [(c.phase, c.bytes) for c in found.crossings] == [
        (Phase.FORWARD, 48),
        (Phase.BACKWARD, 48),
    ]


def test_the_problem_counts_what_crosses() -> None:
    """Forward and back, for cuts between layers of a network with skips."""
    for name in ("resnet", "mobilenet"):
        graph, _ = captured(name)
        problem = from_graph(graph)
        best = plan(problem, 3, bound_seconds=0.0)
        routes = Routes(graph.module, graph.signature, place(graph, best.assignment))
        for number, cut in enumerate(best.cuts):
            for phase, size in ((Phase.FORWARD, cut.bytes), (Phase.BACKWARD, cut.gradient)):
                crossing = [c for c in routes.crossings if c.phase is phase and c.crosses(number)]
                assert sum(c.bytes for c in crossing) == size


def test_gradients_of_a_weight_in_three_stages_are_added_up_once() -> None:
    graph, inputs = _step(Tied(), torch.randint(0, 12, (2, 3)))
    problem = from_graph(graph)
    users = [o.name for o in problem.operators if "embed.weight" in o.parameters]
    assert len(users) == 3
    stages = [0 if o.name == users[0] else 1 for o in problem.operators]
    assignment = {o.name: s for o, s in zip(problem.operators, stages, strict=True)}
    assignment[users[2]] = 2
    for operator in problem.operators[problem.position[users[2]] :]:
        assignment[operator.name] = 2
    found = assert_same_step(graph, inputs, assignment)
    assert found.sums is not None
    assert [p.kind for p in found.sums.inputs] == [Kind.PARTIAL] * 3
    assert all(c.node.name not in {p.name for p in found.sums.inputs} for c in found.crossings)


def test_what_a_checkpoint_drops_is_computed_again_in_its_stage() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            behind = lambda y: torch.sin(torch.tanh(self.second(y)))  # noqa: E731
            return checkpoint(behind, self.first(x), use_reentrant=False)

    graph, inputs = _step(Model(), torch.randn(4, 6))
    found = assert_same_step(graph, inputs, _by_module(graph, {"first": 0, "second": 1}))
    saved = {p.name for p in found.forward[1].outputs if p.kind is Kind.SAVED}
    assert saved == {"addmm"}
    again = {n.name for n in found.backward[1].module.graph.nodes if n.op == "call_function"}
    assert {"addmm_1", "tanh"} <= again


def test_random_operators_of_parallel_branches_keep_their_order() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(self.one(x), 0.5) + F.dropout(self.two(x), 0.5)

    graph, inputs = _step(Branches(), torch.randn(4, 6))
    problem = from_graph(graph)
    random = [n.name for n in graph.operators if effect_of(n) is Effect.RANDOM]
    assert len(random) == 2
    for seed in range(20):
        stages = random_stages(problem, 2, seed)
        assert stages[random[0]] <= stages[random[1]]
        assert_same_step(graph, inputs, stages)


def test_a_buffer_that_changes_stays_in_one_stage() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(6)
            self.linear = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.linear(self.norm(x)))

    problem = from_graph(_step(Twice(), torch.randn(4, 6))[0])
    readers = {o.name for o in problem.operators if "norm.running_mean" in o.parameters}
    changes = next(g for g in problem.together if readers <= g)
    assert len(changes) >= 2


WRITTEN = """gopt 1 joint torch 2.13

forward inputs
  %w = param "w" : f32[3,3]
  %x = input "0" : f32[2,3]

backward inputs
  %t = tangent "0" : f32[4,2,3]

forward
  %mm = aten.mm.default(%x, %w) : f32[2,3]
  %relu_ = aten.relu_.default(%mm) : f32[2,3]
  %expand = aten.expand.default(%relu_, [4, 2, 3]) : f32[4,2,3]{0,3,1}
  %sin = aten.sin.default(%expand) : f32[4,2,3]

backward
  %cos = aten.cos.default(%expand) : f32[4,2,3]
  %mul = aten.mul.Tensor(%t, %cos) : f32[4,2,3]
  %mul_ = aten.mul_.Tensor(%mul, 2.0) : f32[4,2,3]
  %sum = aten.sum.dim_IntList(%mul_, [0]) : f32[2,3]
  %gt = aten.gt.Scalar(%relu_, 0) : bool[2,3]
  %mul_1 = aten.mul.Tensor(%sum, %gt) : f32[2,3]
  %t_1 = aten.t.default(%x) : f32[3,2]{1,3}
  %mm_1 = aten.mm.default(%t_1, %mul_1) : f32[3,3]

forward outputs
  output "0" = %sin

backward outputs
  grad "w" = %mm_1

end
"""


@pytest.mark.parametrize("kind", KINDS)
def test_operators_in_place_stay_with_the_memory_that_they_write(kind: str) -> None:
    graph = parse_graph(WRITTEN)
    assert [o.name for o in from_graph(graph).operators] == ["mm", "sin"]
    found = assert_same_step(graph, inputs_for(graph), {"mm": 0, "sin": 1}, kind)
    for half in (*found.forward, *found.backward):
        names = {n.name for n in half.module.graph.nodes if n.op == "call_function"}
        assert ("relu_" in names) <= ("mm" in names)
        assert ("mul_" in names) <= ("mul" in names)


@pytest.mark.parametrize("kind", [*KINDS, "interleaved"])
@pytest.mark.parametrize("sends", [False, True])
def test_micro_batches_accumulate(kind: str, sends: bool) -> None:
    """In the order of the micro-batches, so to the last bit."""
    graph, inputs = _step(Skips(), torch.randn(2, 6))
    problem = from_graph(graph)
    found = split_graph(graph, random_stages(problem, 4, seed=1))
    kept = by_role(graph, inputs, Role.PARAM)
    batches = [
        [
            kept.get(slot.name, value)
            for slot, value in zip(graph.signature.inputs, batch, strict=True)
        ]
        for batch in (inputs_for(graph, seed) for seed in range(4))
    ]
    schedule = interleaved(2, 2, 4) if kind == "interleaved" else generate(kind, 4, 4)
    results = run_stages(graph, found, with_transfers(schedule) if sends else schedule, *batches)
    expected: dict[str, Tensor] = {}
    for number, batch in enumerate(batches):
        for slot, value in outputs_of(graph, batch).items():
            if slot.role is Role.GRAD:
                before = expected.get(slot.name)
                expected[slot.name] = value if before is None else before + value
            else:
                assert torch.equal(results.outputs[number][slot], value)
    assert results.gradients.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(results.gradients[name], value), name


def test_the_first_part_of_a_backward_is_what_the_stage_before_waits_for() -> None:
    graph, _ = _step(Skips(), torch.randn(2, 6))
    found = split_graph(graph, _by_module(graph, {"first": 0, "second": 1, "third": 2}))
    head, tail = in_two(found.backward[1])
    assert {p.kind for p in head.outputs} <= {Kind.SENT, Kind.KEPT}
    assert {p.kind for p in tail.outputs} == {Kind.STEP}
    products = [n for n in head.module.graph.nodes if "mm" in n.name and n.op == "call_function"]
    assert len(products) == 1  # the gradient of the input; that of the weight is in the rest


def test_late_gradients_follow_the_law_of_delays() -> None:
    """Without flushes the first of two stages trains with weights of two updates before."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Tanh(), nn.Linear(3, 3, bias=False))
    graph = capture(model, (torch.randn(2, 3),)).graph
    found = split_graph(graph, _by_module(graph, {"0": 0, "1": 0, "2": 1}))
    data = [torch.randn(2, 3) for _ in range(7)]
    target, rate = torch.randn(2, 3), 0.1
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    now = dict(weights)

    def update(stage: int, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        for name, gradient in gradients.items():
            now[name] = now[name] - rate * gradient
        return {name: now[name] for name in gradients}

    results = Executor(found).run(
        generate("no_flush", 2, len(data)),
        weights,
        [_named(graph, x) for x in data],
        lambda _, outputs: {"0": outputs["0"] - target},
        update,
    )
    first, second = [weights["0.weight"]], weights["2.weight"]
    for number, x in enumerate(data):
        used = first[max(0, number - 2)].clone().requires_grad_()
        last = second.clone().requires_grad_()
        loss = 0.5 * (torch.tanh(x @ used.T) @ last.T - target).square().sum()
        one, two = torch.autograd.grad(loss, (used, last))
        first.append(first[-1] - rate * one)
        second = second - rate * two
    torch.testing.assert_close(results.values["0.weight"], first[-1])
    torch.testing.assert_close(results.values["2.weight"], second)


def _named(graph: Graph, x: Tensor) -> dict[str, Tensor]:
    return {s.name: x for s in graph.signature.inputs if s.role is Role.INPUT}


def _split_tied() -> Split:
    graph, _ = _step(Tied(), torch.randint(0, 12, (2, 3)))
    problem = from_graph(graph)
    half = len(problem.operators) // 2
    stages = {o.name: int(i >= half) for i, o in enumerate(problem.operators)}
    return split_graph(graph, stages)


def test_bad_input() -> None:
    found = _split_tied()
    run = Executor(found).run
    with pytest.raises(ArgumentError) as caught:
        run(generate("1f1b", 3, 1), {}, [{}], lambda *_: {})
    assert caught.value.message == (
        "the schedule has 3 stages and 1 micro-batches, and there are 2 and 1"
    )
    with pytest.raises(ArgumentError) as caught:
        run(generate("no_flush", 2, 1), {}, [{}], lambda *_: {}, lambda *_: {})
    assert caught.value.message == (
        "a parameter in several stages cannot be updated by each of them alone"
    )
