"""On generated graphs: what the statistics are taken from reproduces the gradients themselves."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.graph import Graph
from graphopt.passbase import Outcome, PassContext
from graphopt.passes.cleanup import Cleanup
from graphopt.passes.kfac import Kfac
from graphopt.plan import Role
from graphopt.plan.kfac import DENSE, Curvature
from graphopt.runtime.kfac.layout import from_matrix, to_matrix
from graphopt.runtime.kfac.packing import unpack
from graphopt.testing import inputs_for, joint_graphs, run_graph
from graphopt.text import parse_graph, print_graph
from graphopt.verify import verify


def _curvature(outcome: Outcome) -> Curvature | None:
    part = outcome.part
    assert part is None or isinstance(part, Curvature)
    return part


def _outputs(graph: Graph, seed: int, role: Role) -> dict[str, torch.Tensor]:
    slots = graph.signature.outputs
    values = run_graph(graph, inputs_for(graph, seed))
    return {s.name: v for s, v in zip(slots, values, strict=True) if s.role is role}


@settings(max_examples=40, deadline=None)
@given(graph=joint_graphs(), seed=st.integers(0, 3))
def test_step_is_as_it_was_and_text_reads_back(graph: Graph, seed: int) -> None:
    inputs = inputs_for(graph, seed)
    before = run_graph(graph, inputs)
    parameters = set(graph.signature.names(Role.PARAM)) & set(graph.signature.names(Role.GRAD))
    outcome = Kfac().apply(graph, PassContext())
    verify(graph, full=True)
    slots = graph.signature.outputs
    after = run_graph(graph, inputs)
    kept = [v for s, v in zip(slots, after, strict=True) if s.role is not Role.AUX]
    assert all(torch.equal(a, b) for a, b in zip(before, kept, strict=True))
    assert {item.site for item in (*outcome.applied, *outcome.declined)} == parameters
    text = print_graph(graph)
    assert print_graph(parse_graph(text)) == text


@pytest.mark.hypothesis  # examples are generated within
def test_statistics_are_of_what_the_gradient_is_the_product_of() -> None:
    seen = 0

    @settings(max_examples=200, deadline=None)
    @given(graph=joint_graphs(), seed=st.integers(0, 3))
    def property_holds(graph: Graph, seed: int) -> None:
        nonlocal seen
        curvature = _curvature(Kfac(solver="ekfac").apply(graph, PassContext()))
        gradients = _outputs(graph, seed, Role.GRAD)
        statistics = _outputs(graph, seed, Role.AUX)
        for block in curvature.blocks if curvature else ():
            if block.kind != "kronecker":
                continue
            wanted = to_matrix(block, gradients)
            back = from_matrix(block, wanted, gradients)
            assert all(
                torch.equal(value, gradients[name].narrow(0, block.start, len(value)))
                for name, value in back.items()
            )
            if not block.samples:
                continue
            g, a = (statistics[f"kfac/{name}"] for name in block.samples)
            found = torch.einsum("nrg,nra->ga", g, a)[None]
            scale = wanted.abs().max().clamp(min=1e-30)
            assert ((found - wanted).abs().max() / scale) < 1e-5
            seen += 1

    property_holds()
    assert seen, "no generated graph had a weight with rows of its own"


@settings(max_examples=30, deadline=None)
@given(graph=joint_graphs(), seed=st.integers(0, 3))
def test_dense_statistics_are_positive_semidefinite(graph: Graph, seed: int) -> None:
    curvature = _curvature(Kfac().apply(graph, PassContext()))
    statistics = _outputs(graph, seed, Role.AUX)
    for block in curvature.blocks if curvature else ():
        for side in block.sides:
            found = statistics[f"kfac/{side.statistic}"]
            assert found.numel() == side.entries
            if side.form == DENSE and found.isfinite().all():
                values = torch.linalg.eigvalsh(unpack(found).double())
                assert values.min() >= -1e-4 * values.abs().max().clamp(min=1e-12)


@pytest.mark.hypothesis  # examples are generated within
@pytest.mark.parametrize("order", ["cleanup first", "cleanup last"])
def test_cleanup_and_kfac_commute_on_what_is_preconditioned(order: str) -> None:
    @settings(max_examples=15, deadline=None)
    @given(graph=joint_graphs())
    def property_holds(graph: Graph) -> None:
        alone, both = graph.copy(), graph.copy()
        one = _curvature(Kfac().apply(alone, PassContext()))
        passes = [Cleanup(), Kfac()][:: 1 if order == "cleanup first" else -1]
        outcomes = {pass_.name: pass_.apply(both, PassContext()) for pass_ in passes}
        verify(both, full=True)
        other = _curvature(outcomes["kfac"])
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert {b.weight for b in one.blocks} == {b.weight for b in other.blocks}

    property_holds()
