"""The pass `partition`: what it decides, what it declines, and what it refuses."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

import graphopt
from graphopt.capture import capture
from graphopt.errors import ArgumentError, PipelineError, SpecError
from graphopt.graph import Graph, Level, phase_of
from graphopt.partitioning.atoms import atoms_of
from graphopt.partitioning.from_graph import from_graph
from graphopt.partitioning.place import Placement
from graphopt.partitioning.split import split
from graphopt.passbase import Outcome, PassContext
from graphopt.passes.partition import Partition
from graphopt.pipeline import Pipeline
from graphopt.plan import Phase, Plan
from graphopt.plan.part import to_data
from graphopt.plan.partition import Stages
from graphopt.render.stages import stages_view
from graphopt.schedules.generate import generate
from graphopt.testing import check_pass, inputs_for, joint_graphs
from graphopt.text import print_graph
from tests.support.graphs import inference_graph
from tests.support.stages import outputs_of, run_stages

GOLDEN = Path(__file__).parents[1] / "golden" / "partition.txt"


class Net(nn.Module):
    """Three layers, of which the first is read by the last, too; a tied weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.hidden = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 8))
        self.head = nn.Linear(8, 16, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        return self.head(self.hidden(x) + x)


def _graph() -> Graph:
    torch.manual_seed(0)
    return capture(Net(), (torch.randint(0, 16, (2, 3)),)).graph


def _apply(pass_: Partition, graph: Graph | None = None, **mesh: int) -> tuple[Outcome, Stages]:
    outcome = pass_.apply(graph or _graph(), PassContext(mesh=mesh))
    assert isinstance(outcome.part, Stages)
    return outcome, outcome.part


def test_golden() -> None:
    _, part = _apply(Partition(stages=3))
    console = Console(width=130, color_system=None, legacy_windows=False)
    with console.capture() as captured:
        console.print(stages_view(to_data(part), "net"))
    text = "".join(f"{line.rstrip()}\n" for line in captured.get().splitlines())
    assert text == GOLDEN.read_text()


def test_pass_on_generated_graphs() -> None:
    def has_two_stages(graph: Graph) -> bool:
        if not any(phase_of(n) is Phase.FORWARD for n in graph.operators):
            return False
        return len(atoms_of(from_graph(graph))) >= 2

    check_pass(Partition(stages=2), graphs=joint_graphs().filter(has_two_stages), max_examples=25)


def test_the_graph_stays_and_its_plan_is_enough_to_split_it() -> None:
    graph = _graph()
    text = print_graph(graph)
    (step,) = Pipeline((Partition(),)).run(graph, PassContext(mesh={"pp": 3}))
    assert print_graph(graph).replace('facts "captured" "staged"\n', "") == text
    assert "staged" in graph.facts
    part = step.outcome.part
    assert isinstance(part, Stages)
    assert [s.rank for s in part.stages] == [0, 1, 2]
    placement = Placement(len(part.stages), part.stage_of, part.sums)
    found = split(graph.module, graph.signature, placement)
    assert [c.node.name for c in found.crossings] == [c.name for c in part.crossings]
    inputs = inputs_for(graph)
    results = run_stages(graph, found, generate("1f1b", 3, 1), inputs)
    for slot, value in outputs_of(graph, inputs).items():
        if slot.role == "grad":
            assert torch.equal(results.gradients[slot.name], value), slot


def test_every_operator_has_a_stage_and_everything_is_reported() -> None:
    graph = _graph()
    outcome, part = _apply(Partition(stages=2), graph)
    placed = {*part.stage_of, *part.sums}
    left = [n for n in graph.operators if n.name not in placed]
    assert {n.all_input_nodes[0].op for n in left} == {"placeholder"}  # views of parameters
    assert [a.what for a in outcome.applied][:3] == [
        "cut into 2 stages",
        "stage 0 on rank 0",
        "stage 1 on rank 1",
    ]
    (shared,) = part.shared
    assert (outcome.applied[3].site, shared.name) == ("embed.weight", "embed.weight")


def test_the_plan_goes_to_json_and_back() -> None:
    args = (torch.randint(0, 16, (2, 3)),)
    plan = graphopt.optimize(Net(), args, passes="partition", mesh="pp=2", dry_run=True)
    assert isinstance(plan, Plan)
    assert Plan.from_json(plan.to_json()) == plan
    part = plan.part(Stages)
    assert part is not None
    assert part.gap == 0.0
    assert json.loads(plan.to_json())["parts"][0]["micro_batches"] == 8


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe", "zero_bubble", "no_flush", "interleaved"])
def test_schedules(schedule: str) -> None:
    pass_ = Partition(schedule=schedule, microbatches=6)  # type: ignore[arg-type]
    untied = capture(Net().hidden, (torch.randn(2, 3, 8),)).graph
    graph = untied if schedule == "no_flush" else _graph()
    _, part = _apply(pass_, graph, pp=2)
    wanted = 4 if schedule == "interleaved" else 2
    assert [s.rank for s in part.stages] == [0, 1] * (wanted // 2)
    assert part.micro_batches == 6
    assert 0.0 < part.bubble < 1.0
    busiest = max(sum(s.seconds for s in part.stages if s.rank == rank) for rank in (0, 1))
    assert part.step > 6 * busiest
    held = {"gpipe": (6, 6), "zero_bubble": (2, 2), "no_flush": (3, 1), "1f1b": (2, 1)}
    if schedule in held:
        assert tuple(s.in_flight for s in part.stages) == held[schedule]


def test_objectives_are_optimal_for_themselves() -> None:
    graph = _graph()
    for objective in ("minmax", "alpa", "gpipe"):
        _, part = _apply(Partition(stages=3, objective=objective), graph)  # type: ignore[arg-type]
        assert (part.proof, part.value, part.gap) == ("exact search", part.lower, 0.0)


def test_the_simulated_step_is_an_objective() -> None:
    steps = {
        objective: _apply(Partition(stages=3, objective=objective))[1]  # type: ignore[arg-type]
        for objective in ("minmax", "alpa", "gpipe", "simulate")
    }
    best = steps.pop("simulate")
    assert best.lower <= best.value <= min(part.step + 1e-12 for part in steps.values()) + 1e-4
    assert best.step <= min(part.step for part in steps.values())


def test_measured_times_are_used_where_asked_for() -> None:
    _, part = _apply(Partition(stages=2, cost="measure"))
    assert part.times == "measured"
    assert all(s.seconds > 0 for s in part.stages)


def test_a_stage_may_have_no_parameter() -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return torch.sin(torch.cos(self.linear(x)))

    graph = capture(Last(), (torch.randn(2, 4),)).graph
    _, part = _apply(Partition(stages=3), graph)
    assert [s.parameters for s in part.stages] == [("linear.weight", "linear.bias"), (), ()]


# -- declined and refused --------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["partition", "partition{stages=1}", "partition{schedule=gpipe}"])
def test_one_stage_is_declined(spec: str) -> None:
    (step,) = Pipeline.parse(spec).run(_graph())
    assert [(d.site, d.reason) for d in step.outcome.declined] == [("graph", "one-stage")]
    assert step.outcome.part is None


def test_graphs_without_backward_are_skipped() -> None:
    graph = inference_graph()
    assert graph.level is Level.INFERENCE
    (step,) = Pipeline.parse("partition{stages=2}").run(graph)
    assert step.skipped.startswith("it works on joint graphs")


def _refusal(pass_: Partition, **mesh: int) -> ArgumentError:
    with pytest.raises(ArgumentError) as caught:
        pass_.apply(_graph(), PassContext(mesh=mesh))
    return caught.value


def test_more_stages_than_operators() -> None:
    error = _refusal(Partition(stages=40))
    assert error.message == "40 stages are more than the 6 operators"
    assert error.hint == "ask for at most 6"


def test_a_memory_limit_that_cannot_be_met() -> None:
    error = _refusal(Partition(stages=2, memory=3000.0))
    assert error.message.startswith("no partition into 2 stages fits into memory: in the one that")
    needs, more = _numbers(error.message)
    assert needs - more == 3000
    assert error.where.startswith("stage ")


def _numbers(message: str) -> tuple[int, int]:
    """What a stage needs, and how much of it is too much."""
    words = [w.rstrip(".,").replace(",", "") for w in message.split()]
    return int(words[words.index("needs") + 1]), int(words[words.index("more") - 1])


def test_a_limit_that_can_be_met_changes_the_stages() -> None:
    _, free = _apply(Partition(stages=2))
    most = max(s.memory for s in free.stages)
    _, tight = _apply(Partition(stages=2, memory=most - 1))
    assert max(s.memory for s in tight.stages) < most
    assert tight.value >= free.value


@pytest.mark.parametrize(
    ("pass_", "mesh", "message"),
    [
        (Partition(stages=3), {"pp": 2}, "3 stages do not fit 2 ranks under the schedule '1f1b'"),
        (
            Partition(stages=3, schedule="interleaved"),
            {"pp": 2},
            "3 stages do not fit 2 ranks under the schedule 'interleaved'",
        ),
        (
            Partition(stages=4, schedule="interleaved"),
            {},
            "the schedule 'interleaved' needs to know how many ranks share the stages",
        ),
        (
            Partition(schedule="interleaved", microbatches=5),
            {"pp": 2},
            "5 micro-batches are not a multiple of 2 ranks",
        ),
        (Partition(stages=2, link="token-ring"), {}, "there is no cluster 'token-ring'"),
    ],
)
def test_numbers_that_do_not_fit(pass_: Partition, mesh: dict[str, int], message: str) -> None:
    assert _refusal(pass_, **mesh).message == message


@pytest.mark.parametrize("spec", ["stages=0", "microbatches=-1", "memory=0", "memory=inf"])
def test_options_that_are_not_positive(spec: str) -> None:
    with pytest.raises(SpecError) as caught:
        Pipeline.parse(f"partition{{{spec}}}")
    assert f"refuses its options: {spec} is not positive" in caught.value.message


@pytest.mark.parametrize("later", ["precision", "flexpoint", "kfac"])
def test_passes_that_rewrite_operators_come_before(later: str) -> None:
    Pipeline.parse(f"{later},partition,group_gradients")
    with pytest.raises(PipelineError) as caught:
        Pipeline.parse(f"partition,{later}")
    assert "must not be 'staged' yet" in caught.value.message
    with pytest.raises(PipelineError):
        Pipeline.parse("group_gradients,partition")


def test_one_process_trains_on_micro_batches() -> None:
    torch.manual_seed(0)
    plain = Net()
    model = graphopt.optimize(
        copy.deepcopy(plain),
        passes="partition{stages=2,microbatches=3}",
        loss=_loss,
        backend="eager",
    )
    tokens = torch.randint(0, 16, (7, 3))
    loss = model.step(tokens, tokens)
    expected = _loss(plain(tokens), tokens)
    expected.backward()
    assert torch.allclose(loss, expected.detach())
    for own, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(own.grad, other.grad, atol=1e-6)
    with torch.no_grad():
        assert torch.allclose(model(tokens), plain(tokens), atol=1e-5)


def _loss(output: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output.flatten(0, 1), target.flatten())


def test_what_is_shared_cannot_be_updated_in_two_stages() -> None:
    with pytest.raises(ArgumentError) as caught:
        _apply(Partition(stages=2, schedule="no_flush"))
    assert caught.value.hint.startswith("operators that share 'embed.weight' are kept together")
