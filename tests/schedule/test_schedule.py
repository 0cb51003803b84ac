"""Reordering the backward half: what it gains, what it leaves alone and what it says."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn

from graphopt.analysis.gradient_order import gradient_order, roofline
from graphopt.analysis.liveness import liveness
from graphopt.capture import capture
from graphopt.capture.sizes import Dimensions
from graphopt.errors import ArgumentError, PipelineError, SpecError
from graphopt.graph import Graph, phase_of
from graphopt.grouping.planner import plan
from graphopt.network.curve import Curve
from graphopt.network.named import ASSUMED, link_curve
from graphopt.passbase import Outcome, PassContext, Send
from graphopt.passes import schedule
from graphopt.passes.schedule import Schedule
from graphopt.passes.schedule import search as schedule_search
from graphopt.passes.schedule.order import best_first
from graphopt.passes.schedule.rewrite import outline, split, splittable, tail
from graphopt.passes.schedule.trial import PAIRS, Step
from graphopt.pipeline.order import check_order
from graphopt.pipeline.spec import parse_spec
from graphopt.plan import Phase
from graphopt.testing import inputs_for, run_graph
from graphopt.text import parse_graph, print_graph
from graphopt.verify import verify
from tests.support.applying import GOLDEN, reasons
from tests.support.graphs import inference_graph

SLOW = Curve.affine(1e-7, 2e-8, "50 MB/s")
FOUR = PassContext(mesh={"dp": 4})


@pytest.fixture
def slow_link(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "link_curve", lambda *_: SLOW)


def captured(model: nn.Module, *shape: int) -> Graph:
    torch.manual_seed(0)
    return capture(model, (torch.randn(shape),), {}).graph


def convolutions() -> Graph:
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3)]
    return captured(nn.Sequential(*layers), 2, 3, 12, 12)


def golden() -> Graph:
    return parse_graph((GOLDEN / "schedule.before.gopt").read_text())


def wide_first() -> Graph:
    """Its last gradient is its largest, as that of an embedding."""
    layers = [nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)]
    return captured(nn.Sequential(*layers), 4, 256)


def bits_kept(graph: Graph, change: Callable[[Graph], object]) -> object:
    inputs = inputs_for(graph)
    expected = run_graph(graph, inputs)
    result = change(graph)
    verify(graph, full=True)
    for before, after in zip(expected, run_graph(graph, inputs), strict=True):
        assert torch.equal(before, after)
    return result


def finish(graph: Graph) -> float:
    order = graph.get(gradient_order)
    return plan(order.ready, SLOW, order.backward, world=4).finish


def apply(graph: Graph, pass_: Schedule | None = None) -> Outcome:
    outcome = bits_kept(graph, lambda g: (pass_ or Schedule()).apply(g, FOUR))
    assert isinstance(outcome, Outcome)
    return outcome


@pytest.mark.usefixtures("slow_link")
def test_golden() -> None:
    graph = golden()
    assert apply(graph).changed
    assert print_graph(graph) == (GOLDEN / "schedule.after.gopt").read_text()


@pytest.mark.usefixtures("slow_link")
@pytest.mark.parametrize("make", [wide_first, convolutions])
def test_the_ladder_is_what_the_graph_then_has(make: Callable[[], Graph]) -> None:
    graph = make()
    before = finish(graph)
    (item,) = apply(graph).applied
    numbers = item.numbers
    assert numbers["grouped_ms"] == pytest.approx(1e3 * before, abs=1e-4)
    assert numbers["scheduled_ms"] == pytest.approx(1e3 * finish(graph), abs=1e-4)
    assert numbers["scheduled_ms"] < numbers["grouped_ms"] <= numbers["ddp_ms"]
    assert numbers["times"] == "roofline"
    assert numbers["moved"] > 0


@pytest.mark.usefixtures("slow_link")
def test_the_forward_half_and_the_chain_keep_their_order() -> None:
    graph = wide_first()
    free = {n.name for n in graph.get(gradient_order).movable}
    was = [n.name for n in graph.nodes if n.name not in free]
    apply(graph)
    assert [n.name for n in graph.nodes if n.name not in free] == was


@pytest.mark.usefixtures("slow_link")
def test_convolutions_are_split_only_where_something_comes_between() -> None:
    graph = convolutions()
    whole = len(splittable(graph))
    (item,) = apply(graph).applied
    assert 0 < item.numbers["split"] <= whole
    names = [n.name for n in graph.operators if "getitem" not in str(n.target)]
    halves = [name for name in names if name.endswith("_weight")]
    assert len(halves) == item.numbers["split"]
    for name in halves:  # the half for the weight goes first, or something comes between
        assert names[names.index(name) - 1] != name.removesuffix("_weight")


def test_both_halves_of_a_split_convolution_give_the_same_bits() -> None:
    graph = convolutions()
    count = len(splittable(graph))
    halves = bits_kept(graph, lambda g: split(g, splittable(g)))
    assert isinstance(halves, dict)
    assert len(halves) == count > 0
    assert splittable(graph) == ()
    weights = [u for u in graph.get(gradient_order).units if len(u.names) == 2]
    assert len(weights) >= count  # weight and bias move together


@pytest.mark.usefixtures("slow_link")
def test_memory_may_forbid_what_gains(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = golden()
    generous, before = graph.copy(), liveness(graph).peak
    (item,) = apply(generous, Schedule(memory=10.0)).applied
    grown = liveness(generous).peak - before
    assert item.numbers["peak_bytes_more"] == grown > 0
    frugal = graph.copy()  # another order gains less and keeps less alive
    (other,) = apply(frugal, Schedule(memory=0.0)).applied
    assert liveness(frugal).peak <= before
    assert item.numbers["scheduled_ms"] < other.numbers["scheduled_ms"] < item.numbers["grouped_ms"]
    monkeypatch.setattr(schedule_search, "best_first", lambda *a: best_first(*a)[:1])
    outcome = apply(graph, Schedule(memory=0.0))
    assert reasons(outcome) == [("backward", "memory")]
    assert outcome.declined[0].numbers["scheduled_ms"] == item.numbers["scheduled_ms"]


def test_latency_bound_links_gain_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    # One message at the end is best, and then no order matters.
    curve = Curve.affine(1.0, 0.0, "a second per message")
    monkeypatch.setattr(schedule, "link_curve", lambda *_: curve)
    graph = wide_first()
    text = print_graph(graph)
    outcome = apply(graph)
    assert reasons(outcome) == [("backward", "no-gain")]
    assert outcome.declined[0].numbers["grouped_ms"] == pytest.approx(1e3, rel=0.1)
    assert print_graph(graph) == text


def test_one_rank_and_no_gradients_are_declined() -> None:
    assert reasons(Schedule().apply(wide_first(), PassContext())) == [("backward", "one-rank")]
    frozen = nn.Linear(4, 4).requires_grad_(False)
    graph = capture(frozen, (torch.randn(2, 4, requires_grad=True),), {}).graph
    assert reasons(Schedule().apply(graph, FOUR)) == [("backward", "no-gradients")]


@dataclass
class OneOfTwo:
    """One of two running ranks; without the decision of another one it is rank 0 itself."""

    told: str = ""
    asked: list[str] = field(default_factory=list)
    size: int = 2
    channel: str = "test"

    def link(self) -> Curve:
        return SLOW

    def agree(self, topic: str, mine: str, decide: Callable[[], str]) -> str:
        self.asked.append(mine)
        self.told = self.told or decide()
        return self.told

    def together(self, topic: str, mine: str, run: Callable[[Send], str]) -> str:
        assert self.asked[-1] == mine
        return run(self.send)

    def send(self, tensor: Tensor) -> OneOfTwo:
        return self

    def wait(self) -> None:
        """The other rank is as fast as the way to it."""


@pytest.fixture
def by_roofline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Profiles without noise: estimated times, here in the place of measured ones."""
    monkeypatch.setattr(schedule, "profile_graph", roofline)
    monkeypatch.setattr(schedule, "race", lambda *_: [0.9] * PAIRS)


def test_a_running_rank_plans_with_measured_times_and_the_measured_link() -> None:
    graph, ctx = wide_first(), PassContext(ranks={"dp": OneOfTwo()})
    outcome = bits_kept(graph, lambda g: Schedule(memory=10.0).apply(g, ctx))
    assert isinstance(outcome, Outcome)
    (item,) = (*outcome.applied, *outcome.declined)
    assert item.numbers["times"] == "measured"
    assert item.numbers["link"] == SLOW.source


@pytest.mark.usefixtures("by_roofline")
def test_all_ranks_take_the_order_of_rank_0(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, graph = OneOfTwo(), OneOfTwo(), golden()
    other = graph.copy()
    assert Schedule().apply(graph, PassContext(ranks={"dp": first})).changed
    second.told = first.told
    fail = "only rank 0 measures"
    monkeypatch.setattr(schedule, "profile_graph", lambda graph: pytest.fail(fail))
    bits_kept(other, lambda g: Schedule().apply(g, PassContext(ranks={"dp": second})))
    assert print_graph(other) == print_graph(graph)
    assert first.asked == second.asked
    assert first.asked[0].splitlines()[1:] == graph.get(gradient_order).sizes


@pytest.mark.usefixtures("by_roofline")
def test_an_order_for_other_operators_is_declined() -> None:
    first, graph = OneOfTwo(), golden()
    assert Schedule().apply(graph, PassContext(ranks={"dp": first})).changed
    other = wide_first()
    text = print_graph(other)
    outcome = Schedule().apply(other, PassContext(ranks={"dp": OneOfTwo(first.told)}))
    assert reasons(outcome) == [("backward", "other-graph")]
    assert print_graph(other) == text


@pytest.mark.usefixtures("by_roofline")
def test_the_order_of_a_graph_for_one_size_holds_where_sizes_are_symbols() -> None:
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3)]
    model, x = nn.Sequential(*layers), torch.randn(2, 3, 12, 12)
    sizes = Dimensions({id(x): {0: "x.0", 2: "x.2", 3: "x.3"}})
    first, fixed = OneOfTwo(), capture(model, (x,), {}).graph
    assert Schedule().apply(fixed, PassContext(ranks={"dp": first})).changed
    symbolic = capture(model, (x,), {}, dimensions=sizes).graph
    symbolic.output.prev.name = "another_name"
    second = PassContext(ranks={"dp": OneOfTwo(first.told)})
    assert Schedule().apply(symbolic, second).changed
    verify(symbolic, full=True)
    targets = [[n.target for n in tail(g)] for g in (fixed, symbolic)]
    assert targets[0] == targets[1]


def test_the_outline_of_a_graph_knows_operators_and_no_sizes() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    graph = captured(model, 4, 6)
    assert outline(captured(model, 7, 6)) == outline(graph)
    swapped = graph.copy()
    first, second = swapped.get(gradient_order).movable[:2]
    assert outline(swapped) == outline(graph)
    second.append(first)
    swapped.changed()
    assert outline(swapped) != outline(graph)


@pytest.mark.usefixtures("by_roofline")
@pytest.mark.parametrize(("slower", "applied"), [(1, True), (2, False)])
def test_what_is_no_faster_when_all_ranks_run_it_is_not_taken(
    monkeypatch: pytest.MonkeyPatch, slower: int, applied: bool
) -> None:
    ratios = [1.1] * slower + [0.8] * (PAIRS - slower)
    ran: list[Step] = []

    def run(present: Step, other: Step, *_: object) -> list[float]:
        for step in (present, other):
            step()
            ran.append(step)
        return ratios

    monkeypatch.setattr(schedule, "race", run)
    graph, rank = golden(), OneOfTwo()
    text = print_graph(graph)
    outcome = Schedule().apply(graph, PassContext(ranks={"dp": rank}))
    assert len(ran) == 2
    assert bool(outcome.applied) is applied
    assert (print_graph(graph) != text) is applied
    (item,) = (*outcome.applied, *outcome.declined)
    numbers = item.numbers
    assert numbers["scheduled_ms"] < numbers["grouped_ms"]
    assert numbers["measured_ratio"] == 0.8
    assert applied or reasons(outcome) == [("backward", "not-confirmed")]


@pytest.mark.usefixtures("by_roofline")
def test_a_rank_with_other_operators_takes_part_in_its_own_order(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, graph = OneOfTwo(), golden()
    assert Schedule().apply(graph, PassContext(ranks={"dp": first})).changed
    choice = json.loads(first.told) | {"graph": "of other operators"}
    tried: list[str] = []
    monkeypatch.setattr(schedule, "step_of", lambda g, *_: tried.append(print_graph(g)))
    own = golden()
    second = OneOfTwo(json.dumps(choice))
    outcome = Schedule().apply(own, PassContext(ranks={"dp": second}))
    assert reasons(outcome) == [("backward", "other-graph")]
    assert tried == [print_graph(own)] * 2


def test_link_is_a_cluster_the_measured_one_or_an_assumed_one() -> None:
    assert link_curve("summit", 4, None).source.startswith("summit")
    assert "assumed" in link_curve("measure", 4, None).source
    assert link_curve("measure", 4, None)(2**20) == link_curve(ASSUMED, 4, None)(2**20)
    assert link_curve("measure", 2, OneOfTwo()) is SLOW
    assert link_curve("summit", 2, OneOfTwo()).source.startswith("summit")
    with pytest.raises(ArgumentError):
        link_curve("sumit", 4, None)


def test_order_of_passes_and_options() -> None:
    check_order(parse_spec("cleanup,schedule,group_gradients"))
    with pytest.raises(PipelineError, match="must run before 'group_gradients'"):
        check_order(parse_spec("group_gradients,schedule"))
    with pytest.raises(SpecError, match="memory is -1"):
        parse_spec("schedule{memory=-1}")
    assert not Schedule().works_on(inference_graph().level)


@pytest.mark.usefixtures("slow_link")
def test_backward_operators_stay_behind_the_forward_half() -> None:
    graph = wide_first()
    apply(graph)
    phases = [phase_of(n) for n in graph.operators]
    assert phases == sorted(phases, key=lambda phase: phase is Phase.BACKWARD)
