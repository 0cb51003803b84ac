"""Relayed graphs compute what the graph computes, and stages only read their neighbour."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from textwrap import dedent

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from graphopt.graph import operator_name
from graphopt.partitioning.atoms import atoms_of
from graphopt.partitioning.from_exported import ExportedProblem
from graphopt.partitioning.relays import STAGE, received, relayed
from tests.support.stages import random_stages

aten = torch.ops.aten

# Operands: how many earlier values an operator reads. Those that write in place come last.
FUNCTIONS = {
    "linear": 1,
    "tanh": 1,
    "add": 2,
    "mul": 2,
    "sum_of_counts": 1,
    "transpose": 1,
    "pieces": 1,
    "mul_": 1,
    "add_": 2,
}
Recipe = list[tuple[str, int, int]]


def _built(recipe: Recipe) -> fx.GraphModule:
    """A graph of 3 x 3 matrices; each instruction names a function and two earlier values."""
    torch.manual_seed(0)
    root, graph = nn.Module(), fx.Graph()
    root.shared = nn.Parameter(torch.randn(3, 3, dtype=torch.float64))
    root.counts = nn.Buffer(torch.zeros(3, dtype=torch.float64))
    values = [graph.placeholder("x"), graph.placeholder("y")]
    made: list[fx.Node] = []
    for index, (kind, first, second) in enumerate(recipe):
        a, b = values[first % len(values)], values[second % len(values)]
        call = graph.call_function
        if kind == "linear":
            weight = nn.Parameter(torch.randn(3, 3, dtype=torch.float64))
            root.register_parameter(f"weight{index}", weight)
            new = call(aten.linear.default, (a, graph.get_attr(f"weight{index}")))
        elif kind == "tanh":
            new = call(aten.tanh.default, (a,))
        elif kind == "sum_of_counts":
            counts = graph.get_attr("counts")
            call(aten.add_.Tensor, (counts, 1.0))
            new = call(aten.add.Tensor, (a, counts))
        elif kind == "transpose":
            new = call(aten.t.default, (a,))
        elif kind == "pieces":
            split = call(aten.split.Tensor, (a, 2))
            parts = [call(operator.getitem, (split, i)) for i in (1, 0)]
            new = call(aten.cat.default, (parts,))
        elif kind in ("mul_", "add_"):
            # Writes into a result that nothing else needs for its backward.
            fresh = call(aten.add.Tensor, (a, 1.0))
            values.append(fresh)
            operands = (fresh, 0.5) if kind == "mul_" else (fresh, b)
            target = aten.mul_.Tensor if kind == "mul_" else aten.add_.Tensor
            early = call(aten.add.Tensor, (fresh, 2.0))
            values.append(early)
            new = call(target, operands)
        else:
            new = call(aten.add.Tensor if kind == "add" else aten.mul.Tensor, (a, b))
        values.append(new)
        made.append(new)
    graph.output((made[-1], made[len(made) // 2]))
    return _with_values(fx.GraphModule(root, graph))


def _with_values(module: fx.GraphModule) -> fx.GraphModule:
    """With fake values, those of parameters included, as an exported graph has them."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    FakeTensorProp(module, mode).propagate(*_inputs())
    for node in module.graph.find_nodes(op="get_attr"):
        node.meta["val"] = mode.from_tensor(getattr(module, str(node.target)))
    return module


def _inputs() -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(3, 3, dtype=torch.float64) for _ in range(2)]


def _step(module: fx.GraphModule) -> tuple[Sequence[Tensor], list[Tensor | None], list[Tensor]]:
    module.zero_grad()
    for counts in module.buffers():
        counts.zero_()
    outputs = module(*_inputs())
    loss = sum(o.square().sum() for o in outputs)
    if loss.requires_grad:
        loss.backward()
    return outputs, [p.grad for p in module.parameters()], [b.clone() for b in module.buffers()]


recipes = st.lists(
    st.tuples(st.sampled_from(list(FUNCTIONS)), st.integers(0, 20), st.integers(0, 20)),
    min_size=2,
    max_size=10,
)


@given(recipes, st.integers(2, 4), st.integers(0, 1000))
@settings(max_examples=80, deadline=None)
def test_any_cut_of_any_graph(recipe: Recipe, stages: int, seed: int) -> None:
    assume(any(kind != "transpose" for kind, _, _ in recipe))  # views alone cannot be cut
    module = _built(recipe)
    exported = ExportedProblem(module)
    stages = min(stages, len(atoms_of(exported.problem)))
    assignment = random_stages(exported.problem, stages, seed)
    graph = relayed(module.graph, exported.stages(assignment))
    graph.lint()
    _check_neighbours(graph, stages)
    wanted, found = _step(module), _step(fx.GraphModule(module, graph))
    torch.testing.assert_close(found, wanted)


def _check_neighbours(graph: fx.Graph, stages: int) -> None:
    place = 0
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        assert node.meta[STAGE] in (place, place + 1), "stages come one after another"
        place = node.meta[STAGE]
        for operand in node.all_input_nodes:
            if operand.op == "placeholder":
                assert place == 0
            elif operand.op == "call_function":
                assert operand.meta[STAGE] in (place, place - 1)
                if operand.meta[STAGE] < place:
                    assert operand.meta["val"].is_contiguous()
                    assert node.target is received or not operand.meta["val"].is_floating_point()
    assert place == stages - 1
    for node in graph.output_node().all_input_nodes:
        assert node.meta[STAGE] == stages - 1


def _text(graph: fx.Graph) -> str:
    lines = []
    for node in graph.nodes:
        if node.op == "call_function":
            operands = ", ".join(n.name for n in node.all_input_nodes)
            stage = node.meta[STAGE]
            lines.append(f"{stage} {node.name} = {operator_name(node)}({operands})")
    returned = ", ".join(n.name for n in graph.output_node().all_input_nodes)
    return "\n".join([*lines, f"return {returned}"])


def test_a_skip_an_input_and_an_early_output() -> None:
    """x is read in stages 0 and 2, the first tanh in 1 and 2, and y before x."""
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    first = graph.call_function(aten.tanh.default, (y,))
    turned = graph.call_function(aten.t.default, (first,))
    second = graph.call_function(aten.sin.default, (turned,))
    joined = graph.call_function(aten.add.Tensor, (second, first))
    last = graph.call_function(aten.mul.Tensor, (joined, x))
    graph.output((last, turned))
    _with_values(fx.GraphModule(nn.Module(), graph))
    found = relayed(graph, {first: 0, turned: 0, second: 1, joined: 2, last: 2})
    assert (
        _text(found)
        == dedent("""\
        0 x_relay = aten.clone.default(x)
        0 tanh_default = aten.tanh.default(y)
        0 t_default = aten.t.default(tanh_default)
        0 t_default_relay = aten.clone.default(t_default)
        1 x_received = received(x_relay)
        1 tanh_default_received = received(tanh_default)
        1 t_default_received = received(t_default_relay)
        1 x_relay_1 = aten.clone.default(x_received)
        1 tanh_default_relay = aten.clone.default(tanh_default_received)
        1 t_default_relay_1 = aten.clone.default(t_default_received)
        1 sin_default = aten.sin.default(t_default_received)
        1 sin_default_relay = aten.clone.default(sin_default)
        2 x_received_1 = received(x_relay_1)
        2 tanh_default_received_1 = received(tanh_default_relay)
        2 t_default_received_1 = received(t_default_relay_1)
        2 sin_default_received = received(sin_default_relay)
        2 t_default_relay_2 = aten.clone.default(t_default_received_1)
        2 add_tensor = aten.add.Tensor(sin_default_received, tanh_default_received_1)
        2 mul_tensor = aten.mul.Tensor(add_tensor, x_received_1)
        return mul_tensor, t_default_relay_2
        """).rstrip()
    )
