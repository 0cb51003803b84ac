"""Ready times and what may move, on graphs whose answers are counted by hand."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn

from graphopt.analysis import profile
from graphopt.analysis.gradient_order import (
    ASSUMED,
    GradientOrder,
    gradient_order,
    measured_order,
    roofline,
)
from graphopt.analysis.profile import profile_graph, profile_in_turn
from graphopt.capture import capture
from graphopt.errors import ArgumentError
from graphopt.graph import Graph, phase_of
from graphopt.plan import Phase, Role
from tests.support.graphs import Builder, aten, grad, linear_graph, output


def mlp() -> Graph:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    return capture(model, (torch.randn(5, 8),), {}).graph


def one_second_each(graph: Graph) -> GradientOrder:
    return measured_order(graph, dict.fromkeys(graph.operators, 1.0))


def targets(nodes: tuple[fx.Node, ...]) -> list[str]:
    return [str(n.target).split(".")[1] for n in nodes]


def test_a_gradient_is_ready_when_all_operators_up_to_it_have_run() -> None:
    graph = mlp()
    order = one_second_each(graph)
    backward = [n for n in graph.operators if phase_of(n) is Phase.BACKWARD]
    assert order.backward == len(backward)
    assert {r.name: r.seconds for r in order.ready} == {
        name: backward.index(graph.gradient(name)) + 1
        for name in ("0.weight", "0.bias", "2.weight", "2.bias")
    }
    assert [r.seconds for r in order.ready] == sorted(r.seconds for r in order.ready)
    assert order.times == "measured"


def test_bytes_kind_and_module() -> None:
    (weight,) = [r for r in mlp().get(gradient_order).ready if r.name == "0.weight"]
    assert (weight.bytes, weight.kind, weight.module) == (16 * 8 * 4, "float32 cpu", "0")


def test_weight_gradients_may_move_and_the_chain_may_not() -> None:
    graph = mlp()
    order = graph.get(gradient_order)
    moves = {unit.names: targets(unit.nodes) for unit in order.units}
    assert moves["2.weight",] == ["t", "mm", "t", "t"]
    assert moves["0.bias",] == ["sum", "view"]
    assert {str(n.target).split(".")[1] for n in order.chain} == {
        "t",
        "mm",
        "detach",
        "threshold_backward",
    }
    assert order.chain.isdisjoint(order.movable)
    assert {n for u in order.units for n in u.nodes} == set(order.movable)


def test_forward_operators_take_no_time_of_backward() -> None:
    graph = linear_graph()
    seconds = {n: 100.0 if phase_of(n) is Phase.FORWARD else 2.0 for n in graph.operators}
    order = measured_order(graph, seconds)
    assert (order.backward, order.ready[0].seconds) == (4.0, 4.0)


def test_gradients_of_inputs_are_not_reduced() -> None:
    b = Builder()
    w, x = b.input(Role.PARAM, "w", (3, 2)), b.input(Role.INPUT, "0", (4, 3))
    tangent = b.input(Role.TANGENT, "0", (4, 2))
    y = b.call(aten.mm.default, x, w)
    gx = b.backward(aten.mm.default, tangent, b.backward(aten.t.default, w))
    gw = b.backward(aten.mm.default, b.backward(aten.t.default, x), tangent)
    order = b.build({output(): y, grad("0"): gx, grad("w"): gw}).get(gradient_order)
    assert [r.name for r in order.ready] == ["w"]
    assert len(order.movable) == 2  # what leads to the gradient of the input stays


def test_what_an_operator_with_effects_reads_or_overwrites_stays() -> None:
    b = Builder()
    w, x = b.input(Role.PARAM, "w", (4,)), b.input(Role.INPUT, "0", (4,))
    tangent = b.input(Role.TANGENT, "0", (4,))
    y = b.call(aten.mul.Tensor, x, w)
    product = b.backward(aten.mul.Tensor, tangent, x)
    summed = b.backward(aten.add_.Tensor, product, tangent)
    gw = b.backward(aten.neg.default, b.backward(aten.exp.default, summed))
    graph = b.build({output(): y, grad("w"): gw})
    assert targets(graph.get(gradient_order).movable) == ["neg"]


def test_a_random_operator_stays() -> None:
    b = Builder()
    w = b.input(Role.PARAM, "w", (4,))
    tangent = b.input(Role.TANGENT, "0", (4,))
    noise = b.backward(aten.rand_like.default, tangent)
    gw = b.backward(aten.mul.Tensor, noise, tangent)
    order = b.build({output(): w, grad("w"): gw}).get(gradient_order)
    assert targets(order.movable) == ["mul"]
    assert noise in order.chain


def test_a_tied_weight_appears_once_at_its_last_use() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(7, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.table(x) @ self.table.weight.t()

    graph = capture(Tied(), (torch.tensor([1, 2]),), {}).graph
    order = one_second_each(graph)
    assert [r.name for r in order.ready] == ["table.weight"]
    assert order.ready[0].seconds == order.backward


def test_a_sparse_gradient_has_its_own_kind() -> None:
    b = Builder()
    w = b.input(Role.PARAM, "w", (6, 2))
    tangent = b.input(Role.TANGENT, "0", (6, 2))
    gw = b.backward(aten.to_sparse.default, tangent)
    (item,) = b.build({output(): w, grad("w"): gw}).get(gradient_order).ready
    assert (item.kind, item.bytes) == ("sparse float32 cpu", 48)


def test_what_backward_returns_as_it_came_is_ready_at_once() -> None:
    b = Builder()
    w = b.input(Role.PARAM, "w", (2,))
    tangent = b.input(Role.TANGENT, "0", (2,))
    order = b.build({output(): w, grad("w"): tangent}).get(gradient_order)
    assert (order.ready[0].seconds, order.backward, order.movable) == (0.0, 0.0, ())


def test_roofline_is_the_slower_of_arithmetic_and_memory() -> None:
    b = Builder()
    w, x = b.input(Role.PARAM, "w", (64, 64)), b.input(Role.INPUT, "0", (64, 64))
    y = b.call(aten.mm.default, x, w)
    moved = b.call(aten.neg.default, y)
    seen = b.call(aten.t.default, moved)
    seconds = b.build({output(): seen}).get(roofline)
    cpu = ASSUMED["cpu"]
    assert seconds[y] == pytest.approx(2 * 64**3 / cpu.flops + cpu.overhead)
    assert seconds[moved] == pytest.approx(2 * 64 * 64 * 4 / cpu.bandwidth + cpu.overhead)
    assert seconds[seen] == 0


def test_measure_times_every_operator_and_leaves_the_random_stream_alone() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Dropout(0.5), nn.Linear(4, 2))
    graph = capture(model, (torch.tensor([1, 4]),), {}).graph
    state = torch.get_rng_state()
    seconds = profile_graph(graph, rounds=1)
    assert torch.equal(state, torch.get_rng_state())
    assert seconds.keys() == set(graph.operators)
    assert min(seconds.values()) > 0
    order = measured_order(graph, seconds)
    assert order.backward == pytest.approx(sum(order.seconds.values()))


def test_forms_of_a_step_are_measured_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = mlp()
    other = graph.copy()
    ran: list[fx.GraphModule] = []
    stopwatch = profile._Stopwatch

    def watched(module: fx.GraphModule) -> profile._Stopwatch:
        ran.append(module)
        return stopwatch(module)

    monkeypatch.setattr(profile, "_Stopwatch", watched)
    first, second = profile_in_turn([graph, other], rounds=2)
    assert ran == [graph.module, other.module] * 3
    assert first.keys() == set(graph.operators)
    assert second.keys() == set(other.operators)


def test_measure_does_not_write_into_the_given_tensors() -> None:
    b = Builder()
    x = b.input(Role.BUFFER, "0", (2,))
    y = b.call(aten.add_.Tensor, x, 1)
    given = torch.ones(2)
    profile_graph(b.build({output(): y}), [given], rounds=1)
    assert torch.equal(given, torch.ones(2))


def test_measure_refuses_what_it_cannot_run() -> None:
    with pytest.raises(ArgumentError, match="rounds is 0"):
        profile_graph(linear_graph(), rounds=0)
    with pytest.raises(ArgumentError, match="1 tensors for 3 inputs"):
        profile_graph(linear_graph(), [torch.ones(1)])
