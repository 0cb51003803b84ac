"""The analyses, against oracles that share no code with them."""

from __future__ import annotations

from collections.abc import Iterator
from operator import getitem as pick
from typing import Any

import networkx as nx
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, fx, nn
from torch.utils.checkpoint import CheckpointPolicy
from torch.utils.flop_counter import FlopCounterMode

from graphopt.analysis.aliasing import storage
from graphopt.analysis.cost import Cost, cost, tensor_bytes
from graphopt.analysis.dependency import backward_before, dependency
from graphopt.analysis.liveness import liveness
from graphopt.analysis.provenance import names, provenance
from graphopt.analysis.regions import regions
from graphopt.analysis.summary import describe, summary
from graphopt.capture import capture
from graphopt.graph import Graph, module_of, phase_of, value_of
from graphopt.plan import Phase, Role
from graphopt.testing import inputs_for, joint_graphs
from tests.support.graphs import Builder, grad, linear_graph, output
from tests.support.models_for_cli import Net

aten = torch.ops.aten


@pytest.fixture(scope="module")
def net() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.fixture(scope="module")
def net_graph(net: Net) -> Graph:
    return capture(net, (torch.randn(2, 3, 8, 8),)).graph


# -- aliasing --------------------------------------------------------------------------------------


class Recording(fx.Interpreter):
    """Runs a graph for real and keeps every value, so that no memory is used twice."""

    def __init__(self, graph: Graph) -> None:
        super().__init__(graph.module, garbage_collect_values=False)
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.values[n] = super().run_node(n)
        return self.values[n]


@settings(deadline=None, max_examples=60)
@given(joint_graphs())
def test_owners_are_the_nodes_whose_memory_really_is_shared(graph: Graph) -> None:
    recording = Recording(graph)
    recording.run(*inputs_for(graph))
    owner = graph.get(storage).owner
    memory: dict[int, fx.Node] = {}
    for node in graph.nodes:
        value = recording.values[node]
        if node.op == "output" or not isinstance(value, Tensor) or not value.numel():
            continue
        place = value.untyped_storage().data_ptr()
        first = memory.setdefault(place, node)
        if first.op == "call_function" and isinstance(value_of(first), Tensor):
            assert owner[node] is owner[first], f"{node} lies in the memory of {first}"
        if owner[node] is not node:
            assert first is not node, f"{node} has memory of its own, not that of {owner[node]}"


def test_pieces_of_a_split_lie_in_its_operand_and_pieces_of_a_reduction_do_not() -> None:
    b = Builder()
    x = b.input(Role.INPUT, "0", (4, 6))
    split = b.call(aten.split.Tensor, x, 2, 1)
    piece = b.call(pick, split, 1)
    best = b.call(aten.max.dim, piece, 1)
    values = b.call(pick, best, 0)
    graph = b.build({output(): values})
    found = graph.get(storage)
    assert found.owner[piece] is x
    assert found.owner[values] is values
    assert found.views == {split, piece, values}


# -- cost ------------------------------------------------------------------------------------------


def test_flops_are_those_that_pytorch_counts_in_eager(net: Net, net_graph: Graph) -> None:
    x = torch.randn(2, 3, 8, 8)
    with FlopCounterMode(display=False) as counter:
        net(x).sum().backward()
    assert net_graph.get(cost).of(net_graph.nodes).flops == counter.get_total_flops()


def test_attention_on_the_cpu_counts_its_matrix_products() -> None:
    batch, heads, length, width = 2, 3, 5, 8

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, k, v)

    class Attention(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attend(q, k, v)

    shape = (batch, heads, length, width)
    graph = capture(Attention(), [torch.randn(shape, requires_grad=True) for _ in range(3)]).graph
    costs = graph.get(cost)
    by_phase = {
        phase: costs.of(n for n in graph.operators if phase_of(n) is phase).flops for phase in Phase
    }
    product = 2 * batch * heads * length * length * width
    assert by_phase == {Phase.FORWARD: 2 * product, Phase.BACKWARD: 5 * product}


def test_bytes_of_a_product_are_its_operands_and_its_result_and_views_are_free() -> None:
    graph = linear_graph()
    costs = graph.get(cost)
    product, transposed = list(graph.operators)[:2]
    assert costs.by_node[product] == Cost(2 * 4 * 3 * 2, 4 * (4 * 3 + 3 * 2), 4 * 4 * 2)
    assert costs.by_node[transposed] == Cost()
    assert costs.by_node[graph.inputs[0]] == Cost()


def test_reading_a_broadcast_value_reads_each_element_once() -> None:
    assert tensor_bytes(torch.ones(1, 3).expand(100, 3)) == 3 * 4
    assert tensor_bytes((torch.ones(2), [torch.ones(3, dtype=torch.int8)], None)) == 8 + 3


def test_an_embedding_reads_the_rows_it_returns_and_not_its_table() -> None:
    b = Builder()
    table = b.input(Role.PARAM, "table", (1000, 8))
    indices = b.input(Role.INPUT, "0", (3,), torch.int64)
    rows = b.call(aten.embedding.default, table, indices)
    graph = b.build({output(): rows})
    assert graph.get(cost).by_node[rows] == Cost(0, 3 * 8 * 4 + 3 * 8, 3 * 8 * 4)


def test_a_conditional_costs_its_dearest_branch() -> None:
    class Branches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cond(x.sum() > 0, lambda x: x @ x, lambda x: x + 1, (x,))

    with torch.no_grad():
        graph = capture(Branches(), (torch.ones(4, 4),)).graph
    assert graph.get(cost).of(graph.nodes).flops == 2 * 4**3


# -- regions ---------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(joint_graphs())
def test_every_operator_and_parameter_is_in_exactly_one_region(graph: Graph) -> None:
    parts = list(graph.get(regions).walk())
    assert sorted(n for part in parts for n in part.nodes) == sorted(graph.operators)
    assert sorted(p for part in parts for p in part.parameters) == sorted(
        graph.signature.names(Role.PARAM)
    )
    for part in parts:
        assert all(module_of(node) == part.path for node in part.nodes)
        assert all(child.path.rpartition(".")[0] == part.path for child in part.children)


def test_regions_are_the_modules_of_the_model(net: Net, net_graph: Graph) -> None:
    found = {part.path: part.kind for part in net_graph.get(regions).walk()}
    called = {n: type(m).__name__ for n, m in net.named_modules() if n not in ("", "layers")}
    assert found == called | {"": "", "layers": ""}


# -- dependency and liveness -----------------------------------------------------------------------


def ancestors(node: fx.Node) -> set[fx.Node]:
    found: set[fx.Node] = set()
    todo = [node]
    while todo:
        new = [n for n in todo.pop().all_input_nodes if n not in found]
        found.update(new)
        todo += new
    return found


@settings(deadline=None, max_examples=30)
@given(joint_graphs())
def test_a_gradient_needs_the_backward_operators_above_it(graph: Graph) -> None:
    assert set(graph.get(dependency)) == set(graph.nodes)
    assert nx.is_directed_acyclic_graph(graph.get(dependency))
    for node in graph.outputs:
        above = {n for n in ancestors(node) if n.op == "call_function" and n.target is not pick}
        assert backward_before(graph, node) == sum(phase_of(n) is Phase.BACKWARD for n in above)


def bytes_saved_by_eager(model: nn.Module, *inputs: Tensor) -> int:
    """Bytes of distinct memory that autograd keeps, beside parameters, buffers and inputs."""
    known = [*model.parameters(), *model.buffers(), *inputs]
    known_places = {t.untyped_storage().data_ptr() for t in known}
    places: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in known_places:
            places[place] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = model(*inputs)
    assert result.grad_fn is not None
    return sum(t.untyped_storage().nbytes() for t in places.values() if t.numel())


def test_saved_activations_are_those_that_eager_autograd_keeps(net: Net, net_graph: Graph) -> None:
    # The functional graph also keeps each updated running statistic beside the buffer it goes to.
    statistics = sum(b.numel() * b.element_size() for b in net.buffers() if b.is_floating_point())
    eager = bytes_saved_by_eager(net, torch.randn(2, 3, 8, 8))
    assert net_graph.get(liveness).saved_bytes == eager + statistics


def alive_at(graph: Graph, position: int) -> Iterator[fx.Node]:
    """Allocating nodes that ran before or at `position` and are used at or after it."""
    nodes, owner = graph.nodes, graph.get(storage).owner
    for made in nodes[: position + 1]:
        if made.op != "call_function" or owner[made] is not made:
            continue
        sharing = [n for n in nodes if owner[n] is made]
        uses = [nodes.index(u) for n in sharing for u in [*n.users, n]]
        if max(uses) >= position:
            yield made


@settings(deadline=None, max_examples=40)
@given(joint_graphs())
def test_the_peak_is_the_largest_sum_of_what_is_alive(graph: Graph) -> None:
    sums = [
        sum(
            tensor_bytes(value_of(n))
            for n in alive_at(graph, position)
            if isinstance(value_of(n), Tensor)
        )
        for position in range(len(graph))
    ]
    found = graph.get(liveness)
    assert found.peak == max(sums)
    if found.peak_at is not None:
        assert sums[graph.nodes.index(found.peak_at)] == found.peak


def test_what_a_checkpoint_computes_again_is_replaced_by_what_it_needs() -> None:
    b = Builder()
    w = b.input(Role.PARAM, "w", (4, 4))
    tangent = b.input(Role.TANGENT, "0", (8, 4))
    start = b.call(aten.mm.default, b.input(Role.INPUT, "0", (8, 4)), w)
    wide = b.call(aten.repeat.default, start, [1, 4])
    again = b.call(aten.sin.default, wide)
    folded = b.call(aten.sum.dim_IntList, b.call(aten.view.default, again, [8, 4, 4]), [1])
    gw = b.backward(aten.mm.default, b.backward(aten.t.default, folded), tangent)
    g2 = b.backward(aten.add.Tensor, gw, b.backward(aten.sum.default, again))
    graph = b.build({output(): folded, grad("w"): g2})
    assert set(graph.get(liveness).saved) == {folded, again}
    for node in (wide, again):
        node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
    graph.changed()
    assert graph.get(liveness).saved == {start: 8 * 4 * 4, folded: 8 * 4 * 4}


def test_an_inference_graph_saves_nothing() -> None:
    b = Builder()
    y = b.call(aten.relu.default, b.input(Role.INPUT, "0", (4, 3)))
    graph = b.build({output(): y})
    found = graph.get(liveness)
    assert (found.saved_bytes, found.peak, found.peak_at) == (0, 48, y)


# -- summary and provenance ------------------------------------------------------------------------


def test_figures_of_a_module_are_the_sums_of_its_parts(net: Net, net_graph: Graph) -> None:
    root = net_graph.get(summary)
    assert root.parameters == sum(p.numel() for p in net.parameters())
    assert root.saved == net_graph.get(liveness).saved_bytes
    layers = next(child for child in root.children if child.path == "layers")
    assert layers.forward.flops == sum(child.forward.flops for child in layers.children)
    assert [child.path for child in root.children] == ["stem", "layers", "head"]
    block = layers.children[0]
    assert (block.kind, block.output, block.parameters) == ("Block", "f32[2,4,6,6]", 156)
    norm = block.children[1]
    assert (norm.path, norm.output) == ("layers.0.norm", "f32[2,4,6,6]")


def test_describe_names_dtype_and_shape() -> None:
    value = (torch.ones(2, 3, dtype=torch.bfloat16), torch.tensor(1), None)
    assert describe(value) == "(bf16[2,3], i64[], NoneType)"


def test_the_story_of_a_weight_leads_to_its_uses_and_its_gradient(net_graph: Graph) -> None:
    told = provenance(net_graph, "layers.1.conv.weight")
    assert (told.what, told.module, told.type) == ("param", "layers.1.conv", "f32[4,4,3,3]")
    assert "models_for_cli.py" in told.source
    assert "self.conv(x)" in told.source
    assert [u.operator for u in told.users] == [
        "aten.convolution.default",
        "aten.convolution_backward.default",
    ]
    assert told.gradient is not None
    assert told.gradient.operator == "aten.convolution_backward.default"
    backward = [
        n for n in net_graph.operators if phase_of(n) is Phase.BACKWARD and n.target is not pick
    ]
    gradient = net_graph.gradient("layers.1.conv.weight")
    assert backward[told.gradient.position - 1] is gradient.args[0]
    assert told.gradient.needs < told.gradient.position <= told.gradient.of == len(backward)


def test_the_story_of_a_head_looks_through_the_transposed_view(net_graph: Graph) -> None:
    told = provenance(net_graph, "head.weight")
    assert [(u.operator, u.phase) for u in told.users] == [
        ("aten.addmm.default", "forward"),
        ("aten.mm.default", "backward"),
    ]


def test_the_story_of_an_operator_names_what_it_reads_and_costs(net_graph: Graph) -> None:
    told = provenance(net_graph, "convolution")
    assert [(p.node, p.operator) for p in told.producers][1:] == [
        ("stem_weight", "param"),
        ("stem_bias", "param"),
    ]
    assert (told.module, told.kind, told.phase) == ("stem", "Conv2d", "forward")
    assert told.flops == 2 * 2 * 4 * 6 * 6 * 27
    assert told.saved == 2 * 4 * 6 * 6 * 4
    with pytest.raises(KeyError):
        provenance(net_graph, "nothing")


def test_inputs_are_found_by_qualified_name_and_by_node(net_graph: Graph) -> None:
    known = names(net_graph)
    assert known["stem.weight"] is known["stem_weight"]
    assert "output" not in known
