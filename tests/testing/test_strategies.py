from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from hypothesis import Phase as SearchPhase
from hypothesis import find, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only

from graphopt.errors import ArgumentError
from graphopt.graph import Graph, Level, phase_of, value_of
from graphopt.passbase import EXACT, REASSOCIATED
from graphopt.plan import Phase, Role, Signature
from graphopt.testing import (
    Instruction,
    Program,
    assert_same,
    at_sizes,
    build,
    inference_graphs,
    inputs_for,
    joint_graphs,
    programs,
    run_graph,
)
from graphopt.testing.comparison import amplification_of
from graphopt.testing.ops_catalogue import CATALOGUE
from graphopt.testing.sizes import hints_of, other_sizes
from graphopt.text import parse_graph, print_graph
from graphopt.verify import verify

aten = torch.ops.aten
ROLES = [Role.PARAM, Role.BUFFER, Role.INPUT, Role.TANGENT]


def graphs() -> st.SearchStrategy[Graph]:
    return joint_graphs() | inference_graphs()


@given(graphs())
def test_graphs_are_legal_and_run(graph: Graph) -> None:
    verify(graph, full=True)
    for node, value in zip(graph.outputs, run_graph(graph, inputs_for(graph)), strict=True):
        assert (value.shape, value.dtype) == (value_of(node).shape, value_of(node).dtype)


@settings(max_examples=12)
@given(joint_graphs(symbolic=True) | inference_graphs(symbolic=True))
def test_graphs_with_symbols_are_those_of_each_size(graph: Graph) -> None:
    verify(graph, full=True)
    constants = dict(graph.module.named_buffers())
    assert print_graph(parse_graph(print_graph(graph), constants)) == print_graph(graph)
    assert other_sizes(graph)
    for sizes in (hints_of(graph), *other_sizes(graph)[:1]):
        fixed, inputs = at_sizes(graph, sizes), inputs_for(graph, sizes=sizes)
        verify(fixed, full=True)
        assert not hints_of(fixed)
        tensors = [value for value in inputs if isinstance(value, Tensor)]
        assert all(map(torch.equal, tensors, inputs_for(fixed)))
        assert_same(run_graph(fixed, tensors), run_graph(graph, inputs), EXACT, graph.signature)


@given(graphs())
def test_signatures_are_those_of_captured_graphs(graph: Graph) -> None:
    signature = graph.signature
    roles = [ROLES.index(slot.role) for slot in signature.inputs]
    assert roles == sorted(roles)
    mutated, returned = signature.names(Role.MUTATION), signature.names(Role.OUTPUT)
    forward = [slot.role for slot in signature.outputs if slot.phase is Phase.FORWARD]
    assert forward == [Role.MUTATION] * len(mutated) + [Role.OUTPUT] * len(returned)
    assert returned == tuple(map(str, range(len(returned))))
    assert set(mutated) <= set(signature.names(Role.BUFFER))
    assert all(phase_of(n) is s.phase for n, s in zip(graph.inputs, signature.inputs, strict=True))

    gradients, tangents = signature.names(Role.GRAD), signature.names(Role.TANGENT)
    if graph.level is Level.INFERENCE:
        assert not gradients
        assert not tangents
    else:
        assert gradients
        assert tangents
        assert set(tangents) <= set(returned)
        assert set(gradients) <= {
            slot.name for slot in signature.inputs if slot.role in (Role.PARAM, Role.INPUT)
        }


@given(graphs())
def test_outputs_share_no_memory(graph: Graph) -> None:
    inputs = inputs_for(graph)
    outputs = run_graph(graph, inputs)
    user = outputs[: graph.signature.num_forward_outputs]
    pointers = [v.untyped_storage().data_ptr() for v in user]
    assert len(set(pointers)) == len(pointers)
    assert not set(pointers) & {v.untyped_storage().data_ptr() for v in inputs}


@given(programs(), st.sampled_from([Level.JOINT, Level.INFERENCE]))
def test_a_program_means_one_graph(program: Program, level: Level) -> None:
    assert print_graph(build(program, level)) == print_graph(build(program, level))


# -- the backward half against autograd on the forward half ----------------------------------------


def forward_by_autograd(graph: Graph, inputs: list[Tensor]) -> list[Tensor]:
    """All outputs, gradients from autograd on the forward nodes alone."""
    signature: Signature = graph.signature
    values: dict[fx.Node, Any] = {}
    wanted = []
    for node, slot, value in zip(graph.inputs, signature.inputs, inputs, strict=True):
        wants = slot.role in (Role.PARAM, Role.INPUT) and slot.name in signature.names(Role.GRAD)
        values[node] = value.clone().requires_grad_(wants)
        if wants:
            wanted.append(values[node])
    torch.manual_seed(0)
    for node in graph.nodes:
        if phase_of(node) is Phase.BACKWARD or node.op in ("placeholder", "output"):
            continue
        args, kwargs = tree_map_only(fx.Node, values.__getitem__, (node.args, node.kwargs))
        if node.op == "get_attr":
            values[node] = graph.module.get_buffer(str(node.target))
        elif node.target is aten._native_batch_norm_legit_functional.default:
            values[node] = batch_norm(*args)
        else:
            values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    forward = [values[n] for n in graph.outputs[: signature.num_forward_outputs]]
    returned = forward[len(signature.names(Role.MUTATION)) :]
    tangents = [values[graph.input(Role.TANGENT, n)] for n in signature.names(Role.TANGENT)]
    outputs = [returned[int(name)] for name in signature.names(Role.TANGENT)]
    return [*forward, *torch.autograd.grad(outputs, wanted, tangents)]


def batch_norm(
    x: Tensor, w: Tensor, b: Tensor, mean: Tensor, var: Tensor, train: bool, rate: float, eps: float
) -> tuple[Tensor, None, None, Tensor, Tensor]:
    mean, var = mean.clone(), var.clone()
    return F.batch_norm(x, mean, var, w, b, train, rate, eps), None, None, mean, var


@given(joint_graphs(), st.integers(0, 3))
def test_the_backward_half_is_the_derivative(graph: Graph, seed: int) -> None:
    inputs = inputs_for(graph, seed)
    outputs = run_graph(graph, inputs)
    amplification = amplification_of(graph, inputs, outputs)
    expected = forward_by_autograd(graph, inputs)
    assert_same(expected, outputs, REASSOCIATED, graph.signature, amplification)


# -- what can be generated, and how it shrinks -----------------------------------------------------


@pytest.mark.parametrize("level", [Level.JOINT, Level.INFERENCE])
@pytest.mark.parametrize("kind", CATALOGUE)
def test_every_kind_makes_legal_graphs_alone(kind: str, level: Level) -> None:
    sizes = []
    for first in range(8):
        steps = (
            Instruction("unary"),
            Instruction(kind, (first, 7 * first, 3, 2 * first, 5, 1)),
            Instruction(kind),
        )
        graph = build(Program(steps, inputs=((2, 3), (2, 2, 4, 4))), level)
        verify(graph, full=True)
        run_graph(graph, inputs_for(graph))
        sizes.append(len(graph))
    assert max(sizes) > len(build(Program((Instruction("unary"),)), level))


def test_all_kinds_of_nodes_that_captured_graphs_have_occur() -> None:
    shapes = ((2, 3), (2, 2, 4, 4))
    steps = [Instruction(kind, tape) for kind in CATALOGUE for tape in ((), (0, 2, 1, 1, 1))]
    graph = build(Program(tuple(steps), shapes, outputs=tuple(range(40)), input_grads=True))
    targets = {str(n.target) for n in graph.operators}
    assert {
        "aten.addmm.default",
        "aten.convolution_backward.default",
        "aten._native_batch_norm_legit_functional.default",
        "aten.native_dropout.default",
        "aten.embedding.default",
        "aten.detach.default",
        "aten._to_copy.default",
    } <= targets
    assert any(n.target is operator.getitem for n in graph.nodes)
    assert any(not n.users for n in graph.operators), "no dead node"
    assert graph.signature.names(Role.MUTATION)


@pytest.mark.parametrize(
    "target", [aten.native_dropout_backward.default, aten.convolution_backward.default]
)
def test_failures_shrink_to_a_few_nodes(target: object) -> None:
    phases = [SearchPhase.generate, SearchPhase.shrink]
    smallest = find(
        joint_graphs(),
        lambda graph: any(n.target is target for n in graph.nodes),
        settings=settings(max_examples=500, database=None, derandomize=True, phases=phases),
    )
    assert len(smallest) <= 10


def test_only_known_kinds_can_be_asked_for() -> None:
    with pytest.raises(ArgumentError, match="unknown kinds of operators: convolutoin"):
        joint_graphs(kinds=["convolutoin", "unary"])
