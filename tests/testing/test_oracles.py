from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import graphopt.testing
from graphopt.errors import ArgumentError, MismatchError
from graphopt.passbase import ALGORITHM, EXACT, REASSOCIATED, lowered
from graphopt.plan import Role
from graphopt.testing import (
    Instruction,
    Program,
    assert_same,
    build,
    inputs_for,
    relative_error,
    run_graph,
    run_graph_fp64,
)
from graphopt.testing.comparison import amplification_of

DROPOUT = Program((Instruction("dropout"),), inputs=((4, 4),))
RANDOM_MASK = Program((Instruction("dropout", (0, 1)),), inputs=((4, 4),))


# -- running ---------------------------------------------------------------------------------------


def test_randomness_comes_from_the_seed_alone() -> None:
    graph = build(DROPOUT)
    inputs = inputs_for(graph)
    state = torch.get_rng_state()
    first = run_graph(graph, inputs, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert_same(first, run_graph(graph, inputs, seed=5), EXACT)
    with pytest.raises(MismatchError):
        assert_same(first, run_graph(graph, inputs, seed=6), EXACT)


def test_results_are_those_of_torch() -> None:
    graph = build(Program((Instruction("linear", (0, 1, 1)),)))
    values = dict(zip(graph.signature.inputs, inputs_for(graph, 3), strict=True))
    named = {(slot.role, slot.name): value for slot, value in values.items()}
    x, tangent = named[Role.INPUT, "0"], named[Role.TANGENT, "0"]
    weight, bias = named[Role.PARAM, "linear0.weight"], named[Role.PARAM, "linear0.bias"]
    results = run_graph(graph, list(values.values()))
    expected = [torch.addmm(bias, x, weight.t()), tangent.t() @ x, tangent.sum(0)]
    assert_same(expected, results, EXACT, graph.signature)


def test_wrong_inputs_are_refused() -> None:
    graph = build(Program())
    inputs = inputs_for(graph)
    with pytest.raises(ArgumentError, match="the graph has 3 inputs, 2 were given"):
        run_graph(graph, inputs[:2])
    with pytest.raises(ArgumentError, match=r"shape \(2, 3\) and dtype torch.float64"):
        run_graph(graph, [inputs[0], inputs[1].double(), inputs[2]])


@pytest.mark.parametrize("program", [DROPOUT, RANDOM_MASK])
def test_double_precision_draws_the_same_random_numbers(program: Program) -> None:
    graph = build(program)
    inputs = inputs_for(graph)
    exact = run_graph_fp64(graph, inputs, seed=4)
    assert all(value.dtype is torch.float64 for value in exact)
    assert_same([v.float() for v in exact], run_graph(graph, inputs, seed=4), REASSOCIATED)


def test_double_precision_ignores_shorter_types() -> None:
    graph = build(Program((Instruction("cast", (0, 0, 1)),)))  # to bfloat16 and back
    inputs = inputs_for(graph)
    x = inputs[graph.signature.input_index(Role.INPUT, "0")]
    index = graph.signature.output_index(Role.OUTPUT, "0")
    rounded = run_graph(graph, inputs)[index]
    assert relative_error(run_graph_fp64(graph, inputs)[index], rounded) > 1e-4
    assert x.dtype is torch.float32


# -- inputs ----------------------------------------------------------------------------------------


def test_inputs_fit_what_reads_them() -> None:
    steps = (
        Instruction("embedding", (2, 3)),
        Instruction("cross_entropy"),
        Instruction("batch_norm", (0, 1)),
    )
    graph = build(Program(steps, inputs=((4, 2),)))
    limits: dict[str, int] = {}
    for seed in range(20):
        for node, slot, value in zip(
            graph.inputs, graph.signature.inputs, inputs_for(graph, seed), strict=True
        ):
            assert value.stride() == node.meta["val"].stride()
            if slot.role is Role.BUFFER and value.is_floating_point():
                assert value.min() >= 0.5
            if slot.role is Role.INPUT and not value.is_floating_point():
                limits[slot.name] = max(limits.get(slot.name, 0), int(value.max()))
                run_graph(graph, inputs_for(graph, seed))
    rows = graph.input(Role.PARAM, "embedding0.weight").meta["val"].shape[0]
    assert rows - 1 in limits.values()
    assert_same(inputs_for(graph, 1), inputs_for(graph, 1), EXACT)
    with pytest.raises(MismatchError):
        assert_same(inputs_for(graph, 1), inputs_for(graph, 2), EXACT)


# -- comparing -------------------------------------------------------------------------------------

ONE = torch.tensor([1.0, 2.0, -4.0])


def test_classes_allow_what_they_say() -> None:
    near, far = ONE + 1e-5, ONE + 0.1
    assert_same([ONE], [near], REASSOCIATED)
    assert_same([ONE], [far], lowered(0.03))
    assert_same([ONE], [far], ALGORITHM)
    for actual, numerics in [(near, EXACT), (far, REASSOCIATED), (far, lowered(0.02))]:
        with pytest.raises(MismatchError):
            assert_same([ONE], [actual], numerics)
    assert_same([ONE], [far], REASSOCIATED, amplification=[300.0])


def test_the_worst_output_is_named() -> None:
    graph = build(Program())
    expected = [torch.ones(2, 3), torch.ones(3)]
    actual = [torch.ones(2, 3) + 0.25, torch.tensor([1.0, 3.0, 1.0])]
    with pytest.raises(MismatchError) as error:
        assert_same(expected, actual, EXACT, graph.signature)
    assert error.value.message == (
        "grad 'scale' is off by 2 of its largest magnitude; exact allows 0 (and 1 more)"
    )
    assert error.value.where == "grad 'scale' at [1]: 1.0 expected, 3.0 found"


def test_shapes_and_types_must_agree_in_every_class() -> None:
    with pytest.raises(MismatchError, match="output 0 has shape"):
        assert_same([ONE], [ONE[:2]], ALGORITHM)
    with pytest.raises(MismatchError, match=r"dtype torch\.float64 instead of"):
        assert_same([ONE], [ONE.double()], ALGORITHM)
    with pytest.raises(MismatchError, match="2 outputs were expected, there are 1"):
        assert_same([ONE, ONE], [ONE], ALGORITHM)


def test_values_that_are_not_finite_must_agree() -> None:
    nan, inf = torch.tensor([1.0, float("nan")]), torch.tensor([1.0, float("inf")])
    assert_same([nan, inf], [nan.clone(), inf.clone()], EXACT)
    assert relative_error(nan, inf) == float("inf")
    assert relative_error(inf, -inf) == float("inf")
    with pytest.raises(MismatchError):
        assert_same([inf], [torch.tensor([1.0, 5.0])], lowered(0.5))


def test_graphs_that_amplify_rounding_are_recognised() -> None:
    plain = build(Program((Instruction("linear"),)))
    # The gradient of a batch norm of a batch norm is all rounding: the second changes nothing.
    norms = build(Program((Instruction("batch_norm"), Instruction("batch_norm")), inputs=((4, 4),)))
    for graph, is_ordinary in [(plain, True), (norms, False)]:
        inputs = inputs_for(graph)
        worst = max(amplification_of(graph, inputs, run_graph(graph, inputs)))
        assert (worst == 1.0) is is_ordinary


# -- the package -----------------------------------------------------------------------------------


def test_every_public_name_exists() -> None:
    assert all(getattr(graphopt.testing, name) is not None for name in graphopt.testing.__all__)


def test_oracles_and_inputs_do_without_hypothesis() -> None:
    code = "import sys, graphopt.testing.oracles, graphopt.testing.inputs, graphopt.testing.corpus"
    unwanted = "{'hypothesis', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", f"{code}; assert not {unwanted}, {unwanted}"], check=True)
