"""The front of time and noise, and the choice within a budget, against all choices there are."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import graphopt
from graphopt.analysis import gradient_order
from graphopt.capture import capture
from graphopt.errors import ArgumentError
from graphopt.graph import Graph
from graphopt.passbase import Outcome, PassContext
from graphopt.passes.precision import Precision
from graphopt.passes.precision.formats import FORMATS
from graphopt.passes.precision.front import sweep, within
from graphopt.passes.precision.mincut import Noise, Times, minimum_cut
from graphopt.passes.precision.problem import Problem, find_problem
from graphopt.pipeline import Pipeline
from tests.precision.test_mincut import BF16, GRAPHS
from tests.precision.test_pass import QUICK

LARGEST = 9

slowly = settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)


def _times(problem: Problem, draw: st.DataObject) -> Times:
    seconds = st.integers(0, 20).map(float)
    high, low = ({n: draw.draw(seconds) for n in problem.units} for _ in range(2))
    return Times(high, low, {v: draw.draw(seconds) for v in problem.values()})


def _noise(problem: Problem, draw: st.DataObject) -> Noise:
    change = st.sampled_from([0.0, 0.0, 1.0, 2.0, 3.0, 8.0])
    reads = {(v, n): draw.draw(change) for n, unit in problem.units.items() for v in unit.read}
    return Noise({n: draw.draw(change) for n in problem.units}, reads)


def _change(problem: Problem, noise: Noise, low: frozenset[fx.Node]) -> float:
    """Counted value by value: what is lowered rounds its result, and what it reads wide."""
    total = 0.0
    for node in low:
        total += noise.result[node]
        for value in set(problem.units[node].read):
            maker = [n for n, u in problem.units.items() if value in u.values]
            if not maker or maker[0] not in low:
                total += noise.read[value, node]
    return total


def _choices(problem: Problem) -> list[frozenset[fx.Node]]:
    nodes = list(problem.units)
    return [
        frozenset(chosen)
        for count in range(len(nodes) + 1)
        for chosen in itertools.combinations(nodes, count)
    ]


@slowly
@given(graph=GRAPHS, draw=st.data())
def test_no_choice_costs_less_at_its_price(graph: Graph, draw: st.DataObject) -> None:
    problem = find_problem(graph, BF16, frozenset())
    assume(0 < len(problem.units) <= LARGEST)
    times, noise = _times(problem, draw), _noise(problem, draw)
    price = draw.draw(st.sampled_from([0.25, 1.0, 4.0]))

    def cost(low: frozenset[fx.Node]) -> float:
        return times.total(problem, low) + price * _change(problem, noise, low)

    found = minimum_cut(problem, times, False, noise, price)
    assert noise.total(problem, found) == _change(problem, noise, found)
    assert cost(found) == pytest.approx(min(map(cost, _choices(problem))), abs=1e-4)


@slowly
@given(graph=GRAPHS, draw=st.data())
def test_the_front_is_the_lower_hull_of_all_choices(graph: Graph, draw: st.DataObject) -> None:
    problem = find_problem(graph, BF16, frozenset())
    assume(0 < len(problem.units) <= LARGEST)
    times, noise = _times(problem, draw), _noise(problem, draw)
    front = sweep(problem, times, noise, follow=False)
    every = [(times.total(problem, low), _change(problem, noise, low)) for low in _choices(problem)]
    assert front[-1].change == 0
    assert front[0].seconds == min(seconds for seconds, _ in every)
    for fast, exact in itertools.pairwise(front):
        assert fast.seconds < exact.seconds
        assert fast.change > exact.change
        # Nothing lies below the line through two neighbours.
        price = (exact.seconds - fast.seconds) / (fast.change - exact.change)
        line = fast.seconds + price * fast.change
        assert min(s + price * c for s, c in every) == pytest.approx(line, rel=1e-5, abs=1e-5)
    budget = draw.draw(st.sampled_from([0.5, 2.0, 6.0, 20.0]))
    taken = within(front, budget)
    assert taken.change <= budget
    assert all(p.change > budget for p in front if p.seconds < taken.seconds)


def test_what_is_unknown_is_not_rounded_for_any_price() -> None:
    graph = capture(nn.Linear(4, 4), (torch.randn(2, 4),)).graph
    problem = find_problem(graph, BF16, frozenset())
    times = Times(
        dict.fromkeys(problem.units, 1.0),
        dict.fromkeys(problem.units, 0.0),
        dict.fromkeys(problem.values(), 0.0),
    )
    product = next(n for n in problem.units if n.name == "addmm")
    noise = Noise(
        {n: float("inf") if n is product else 0.0 for n in problem.units},
        {(v, n): 0.0 for n, unit in problem.units.items() for v in unit.read},
    )
    for price in (0.0, 1.0, float("inf")):
        found = minimum_cut(problem, times, False, noise, price)
        assert product not in found
        assert found


# -- the pass --------------------------------------------------------------------------------------


class Deep(nn.Module):
    """Layers whose outputs count for less and less."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(5))

    def forward(self, x: Tensor) -> Tensor:
        total = torch.zeros_like(x)
        for index, layer in enumerate(self.layers):
            total = total + layer(x) * 10.0**-index
        return total


@pytest.fixture
def deep(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[nn.Module, Tensor, str]:
    monkeypatch.setitem(gradient_order.ASSUMED, "cpu", QUICK)
    torch.manual_seed(0)
    model, x = Deep(), torch.randn(64, 32)
    file = tmp_path / "deep.json"
    graphopt.calibrate(model, x).save(file)
    return model, x, str(file)


def _run(model: nn.Module, x: Tensor, **options: object) -> tuple[Graph, Outcome]:
    graph = capture(model, (x,)).graph
    Pipeline.parse("cleanup").run(graph)
    pass_ = Precision(cost="roofline", sums="low", **options)  # type: ignore[arg-type]
    return graph, pass_.apply(graph, PassContext())


def test_a_budget_lowers_the_layers_that_matter_least(deep: tuple[nn.Module, Tensor, str]) -> None:
    model, x, file = deep
    lowered = []
    changes = []
    for budget in (0.0, 1e-6, 1e-8, 1e-10, 1e-14):
        _, outcome = _run(model, x, calibration=file, budget=budget)
        (totals,) = outcome.tables["totals"]
        change = totals["change"]
        assert isinstance(change, float)
        assert not budget or change <= budget
        changes.append(change)
        rows = [r for r in outcome.tables["operators"] if r["operator"] == "aten.addmm.default"]
        lowered.append([r["module"] for r in rows if r["format"] == "bf16"])
        over = {d.site for d in outcome.declined if d.reason == "over-budget"}
        assert over == {r["site"] for r in rows if r["format"] == "float32"} or not budget
    assert len(lowered[0]) == 5
    assert changes == sorted(changes, reverse=True)
    for more, fewer in itertools.pairwise(lowered):
        assert set(fewer) <= set(more)
        assert fewer == more[len(more) - len(fewer) :]  # the first layers go first
    assert 0 < len(lowered[2]) < 5


def test_the_expected_change_is_the_one_that_is_measured(
    deep: tuple[nn.Module, Tensor, str],
) -> None:
    """Half the squared change of the outputs, over all layers that are lowered together."""
    model, x, file = deep
    exact = model(x).detach()
    for budget in (0.0, 1e-8):
        spec = f"cleanup,precision{{cost=roofline,sums=low,calibration={file},budget={budget}}}"
        lowered = graphopt.optimize(Deep(), passes=spec, backend="eager")
        lowered.load_state_dict(model.state_dict())
        moved = float((lowered(x).detach() - exact).square().sum()) / (2 * len(x))
        _, outcome = _run(model, x, calibration=file, budget=budget)
        change = outcome.tables["totals"][0]["change"]
        assert isinstance(change, float)
        assert 0.5 < moved / change < 2


def test_the_front_is_in_the_report(deep: tuple[nn.Module, Tensor, str]) -> None:
    model, x, file = deep
    _, outcome = _run(model, x, calibration=file, budget=1e-8)
    front = outcome.tables["front"]
    assert len(front) > 3
    assert [row["chosen"] for row in front].count(1) == 1
    for fast, exact in itertools.pairwise(front):
        assert fast["seconds"] < exact["seconds"]  # type: ignore[operator]
        assert fast["change"] > exact["change"]  # type: ignore[operator]
    assert "front" not in _run(model, x)[1].tables


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 1e-3}, "budget=0.001 needs a calibration"),
        ({"budget": -1.0, "calibration": "f"}, "budget=-1 is no change of a loss"),
        ({"budget": float("nan"), "calibration": "f"}, "budget=nan is no change"),
        ({"budget": float("inf"), "calibration": "f"}, "budget=inf is no change"),
        ({"budget": 1.0, "calibration": "f", "policy": "tf"}, "policy=tf weighs nothing"),
        ({"calibration": "f", "format": "mxfp8"}, "say nothing of rounding to mxfp8"),
    ],
    ids=str,
)
def test_budgets_that_cannot_be_kept(options: dict[str, object], message: str) -> None:
    with pytest.raises(ArgumentError, match=message) as caught:
        Precision(**options)  # type: ignore[arg-type]
    assert caught.value.hint


def test_formats_have_a_sensitivity_each(deep: tuple[nn.Module, Tensor, str]) -> None:
    """float16 has three bits more than bfloat16: errors are squared, so a factor of 64."""
    model, x, file = deep
    assert set(FORMATS) >= {"bf16", "fp16"}
    changes = {
        format: _run(model, x, calibration=file, format=format, policy="tf")[1]
        for format in ("bf16", "fp16")
    }
    bf16, fp16 = (o.tables["totals"][0]["change"] for o in changes.values())
    assert bf16 / fp16 == pytest.approx(64, rel=0.15)  # type: ignore[operator]
