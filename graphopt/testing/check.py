"""`check_pass`: everything that a pass has to prove, on generated graphs.

Each obligation is one row of a table and sees one application of the pass. A failure shows the
smallest graph that hypothesis found for it, as `.gopt` text, and the spec that fails on it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from graphopt import registry
from graphopt.errors import ArgumentError
from graphopt.extras import extra
from graphopt.graph import Graph, Level
from graphopt.passbase import Pass, PassContext
from graphopt.pipeline.spec import format_pass, options_of, parse_spec
from graphopt.pipeline.values import format_value, parse_value
from graphopt.plan import Role
from graphopt.testing.inputs import inputs_for
from graphopt.testing.obligations import OBLIGATIONS, Application
from graphopt.testing.sizes import at_sizes, other_sizes
from graphopt.testing.strategies import forward_graphs, inference_graphs, joint_graphs
from graphopt.text import print_graph
from graphopt.verify import verify

with extra("testing", "check_pass"):
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import strategies as st


def check_pass(
    pass_: Pass,
    *,
    graphs: st.SearchStrategy[Graph] | None = None,
    max_examples: int = 50,
    symbolic_examples: int = 8,
    mesh: Mapping[str, int] | None = None,
) -> None:
    """Prove a pass on generated graphs, or show the smallest one that it fails on.

    Args:
        pass_: the pass, with the options to be checked.
        graphs: graphs to try; by default generated ones of every level that the pass works on.
            One with symbols has the sizes of its call where the pass takes none.
        max_examples: how many of them.
        symbolic_examples: how many more in which sizes are symbols, where the pass takes these
            and `graphs` are not given.
        mesh: sizes of the parallel dimensions that the pass is told.

    Raises:
        AssertionError: an obligation of `OBLIGATIONS` is violated, with the graph and the spec; or
            the pass applied and declined nothing in any graph, so that nothing was proved.
        ArgumentError: the pass requires facts that no generated graph has.
    """
    _check_options(pass_)
    both = [(graphs, max_examples)] if graphs is not None else []
    if graphs is None:
        both.append((_default_graphs(pass_), max_examples))
    if graphs is None and pass_.symbolic and symbolic_examples:
        both.append((_default_graphs(pass_, symbolic=True), symbolic_examples))
    sites = sum(_check_all(pass_, tried, count, mesh or {}) for tried, count in both)
    assert sites, (
        f"pass {pass_.name!r} applied and declined nothing in {max_examples} generated graphs, so "
        "nothing was proved; give `graphs=` with the operators that it is about, such as "
        "joint_graphs(kinds=[...])"
    )


class _PassFailure(AssertionError):
    """One application that violates an obligation."""


def _check_all(
    pass_: Pass, graphs: st.SearchStrategy[Graph], max_examples: int, mesh: Mapping[str, int]
) -> int:
    """Check one application on each of some graphs; the number of sites of all of them."""
    sites = 0

    @settings(
        max_examples=max_examples,
        deadline=None,
        phases=[phase for phase in Phase if phase is not Phase.explain],  # the text explains more
        report_multiple_bugs=False,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(graph=graphs, seed=st.integers(0, 3))
    def property_holds(graph: Graph, seed: int) -> None:
        nonlocal sites
        sites += _check_once(pass_, graph, seed, mesh)

    try:
        property_holds()
    except _PassFailure as failure:
        raise AssertionError(str(failure)) from failure.__cause__
    return sites


def _check_once(pass_: Pass, graph: Graph, seed: int, mesh: Mapping[str, int]) -> int:
    """Check one application; the number of sites that the pass applied or declined."""
    if not pass_.symbolic:
        graph = at_sizes(graph, {})
    verify(graph, full=True)
    if missing := sorted(pass_.requires - graph.facts):
        raise ArgumentError(
            f"pass {pass_.name!r} requires {', '.join(missing)}, which these graphs do not have",
            hint="give `graphs=` that a pass providing it has rewritten",
        )
    before, after, inputs = graph.copy(), graph.copy(), inputs_for(graph, seed)
    ctx = PassContext(mesh=mesh, running=pass_.name, parameters=_parameters(graph, inputs))
    name, sizes = "runs", other_sizes(graph)
    try:
        outcome = pass_.apply(after, ctx)
        application = Application(pass_, before, after, outcome, ctx, inputs, sizes)
        for name, obligation in OBLIGATIONS.items():  # noqa: B007
            obligation(application)
    except Exception as error:
        raise _PassFailure(_message(pass_, name, before, after, seed, error)) from error
    return len(outcome.applied) + len(outcome.declined)


def _parameters(graph: Graph, inputs: Sequence[Any]) -> dict[str, Tensor]:
    """What a pass on a forward graph may replace."""
    slots = graph.signature.inputs if graph.level is Level.FORWARD else ()
    pairs = zip(slots, inputs, strict=False)
    return {slot.name: value for slot, value in pairs if slot.role is Role.PARAM}


def _check_options(pass_: Pass) -> None:
    assert dataclasses.is_dataclass(pass_), f"pass {pass_.name!r} is not a dataclass"
    spec = format_pass(pass_)
    for option in options_of(type(pass_)):
        value = getattr(pass_, option.name)
        text = format_value(value, option.kind)
        read = parse_value(text, option.kind)
        assert read == value, f"option {option.name}={value!r} prints as {text!r}, read as {read!r}"
    if pass_.name in registry.names():
        assert parse_spec(spec) == (pass_,), f"spec {spec!r} does not read back as {pass_!r}"


def _default_graphs(pass_: Pass, *, symbolic: bool = False) -> st.SearchStrategy[Graph]:
    strategies = {
        "joint": joint_graphs(symbolic=symbolic),
        "inference": inference_graphs(symbolic=symbolic),
        "forward": forward_graphs(symbolic=symbolic),
    }
    usable = [graphs for level, graphs in strategies.items() if level in pass_.levels]
    if not usable:
        raise ArgumentError(
            f"graphs of the levels of pass {pass_.name!r} cannot be generated",
            hint="give them as `graphs=`",
        )
    return st.one_of(usable)


def _message(
    pass_: Pass, obligation: str, before: Graph, after: Graph, seed: int, error: Exception
) -> str:
    try:
        result = print_graph(after).strip()
    except Exception as unprintable:  # a broken graph is what this message is about
        result = f"(not printable: {unprintable!r})\n{after.fx}"
    return (
        f"pass {pass_.name!r} fails {obligation!r}: {type(error).__name__}: {error}\n\n"
        f"spec: {format_pass(pass_)}\n"
        f"inputs: graphopt.testing.inputs_for(graph, seed={seed})\n\n"
        f"graph before:\n{print_graph(before).strip()}\n\n"
        f"graph after:\n{result}\n"
    )
