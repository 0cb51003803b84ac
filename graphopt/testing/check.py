"""`check_pass`: everything that a pass has to prove, on generated graphs.

Each obligation is one row of a table and sees one application of the pass. A failure shows the
smallest graph that hypothesis found for it, as `.gopt` text, and the spec that fails on it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from graphopt.errors import ArgumentError
from graphopt.graph import Graph
from graphopt.passbase import Outcome, Pass, PassContext
from graphopt.plan import Role
from graphopt.testing.comparison import amplification_of, assert_same
from graphopt.testing.inputs import inputs_for
from graphopt.testing.oracles import run_graph
from graphopt.testing.strategies import inference_graphs, joint_graphs


def check_pass(
    pass_: Pass,
    *,
    graphs: st.SearchStrategy[Graph] | None = None,
    max_examples: int = 50,
    mesh: Mapping[str, int] | None = None,
) -> None:
    """Prove a pass on generated graphs, or show the smallest one that it fails on.

    Args:
        pass_: the pass, with the options to be checked.
        graphs: graphs to try; by default generated ones of every level that the pass works on.
        max_examples: how many of them.
        mesh: sizes of the parallel dimensions that the pass is told.

    Raises:
        AssertionError: an obligation of `OBLIGATIONS` is violated; with the graph and the spec.
        ArgumentError: the pass requires facts that no generated graph has.
    """
    _check_options(pass_)
    if graphs is None:
        graphs = _default_graphs(pass_)

    @settings(
        max_examples=max_examples,
        deadline=None,
        report_multiple_bugs=False,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(graph=graphs, seed=st.integers(0, 3))
    def property_holds(graph: Graph, seed: int) -> None:
        _check_once(pass_, graph, seed, mesh or {})

    try:
        property_holds()
    except _PassFailure as failure:
        raise AssertionError(str(failure)) from failure.__cause__


class _PassFailure(AssertionError):
    """One application that violates an obligation."""


@dataclass(frozen=True)
class Trial:
    """One application of a pass.

    Attributes:
        pass_: the pass.
        before: the graph as it was.
        after: the graph that the pass has rewritten.
        outcome: what it says that it did.
        ctx: what it was told.
        inputs: a value for each input of `before`.
    """

    pass_: Pass
    before: Graph
    after: Graph
    outcome: Outcome
    ctx: PassContext
    inputs: list[Tensor] = field(repr=False)

    def inputs_after(self) -> list[Tensor]:
        """The same values for the inputs of `after`; inputs that the pass added start from `ctx`."""
        values = dict(zip(self.before.signature.inputs, self.inputs, strict=True))
        return [
            values[slot] if slot in values else self.ctx.state[slot.name]
            for slot in self.after.signature.inputs
        ]


def _check_once(pass_: Pass, graph: Graph, seed: int, mesh: Mapping[str, int]) -> None:
    from graphopt.verify import verify

    verify(graph, full=True)
    if missing := sorted(pass_.requires - graph.facts):
        raise ArgumentError(
            f"pass {pass_.name!r} requires {', '.join(missing)}, which these graphs do not have",
            hint="give `graphs=` that a pass providing it has rewritten",
        )
    before, after, ctx = graph.copy(), graph.copy(), PassContext(mesh=mesh)
    name = "runs"
    try:
        outcome = pass_.apply(after, ctx)
        trial = Trial(pass_, before, after, outcome, ctx, inputs_for(before, seed))
        for name, obligation in OBLIGATIONS.items():  # noqa: B007
            obligation(trial)
    except Exception as error:
        raise _PassFailure(_message(pass_, name, before, after, seed, error)) from error


# -- obligations -----------------------------------------------------------------------------------


def _verifies(trial: Trial) -> None:
    from graphopt.verify import verify

    verify(trial.after, full=True)


def _reports(trial: Trial) -> None:
    changed = _text(trial.before) != _text(trial.after)
    assert not changed or trial.outcome.applied, (
        "the graph changed, and the outcome lists nothing as applied"
    )
    assert not changed or trial.after.version > 0, (
        "the graph changed without a call of `graph.changed()`"
    )


def _keeps_signature(trial: Trial) -> None:
    before, after = trial.before.signature, trial.after.signature
    if trial.pass_.changes_signature:
        lost = [slot for slot in before.outputs if slot not in after.outputs]
        assert not lost, f"{lost[0]} is not returned any more"
        return
    assert after == before, "the signature changed, and `changes_signature` is not declared"
    names = [[node.name for node in graph.inputs] for graph in (trial.before, trial.after)]
    assert names[0] == names[1], f"placeholders were renamed from {names[0]} to {names[1]}"


def _same_results(trial: Trial) -> None:
    before, after = trial.before, trial.after
    numerics = trial.pass_.numerics
    expected = run_graph(before, trial.inputs)
    results = dict(
        zip(after.signature.outputs, run_graph(after, trial.inputs_after()), strict=True)
    )
    actual = [results[slot] for slot in before.signature.outputs]
    amplification = None
    if numerics.kind in ("reassociated", "lowered"):
        amplification = amplification_of(before, trial.inputs, expected)
    assert_same(expected, actual, numerics, before.signature, amplification)


def _no_new_aliases(trial: Trial) -> None:
    """A returned view of an input would be overwritten by a mutation, or let the user write into it.

    Gradients may alias tangents, as they do in eager.
    """
    fresh = {
        slot
        for slot, alias in _aliases(trial.before, trial.inputs).items()
        if slot.role is not Role.GRAD and not alias
    }
    for slot, alias in _aliases(trial.after, trial.inputs_after()).items():
        assert slot not in fresh or not alias, f"{slot} shares memory with {alias}, as it did not"


def _is_deterministic(trial: Trial) -> None:
    again = trial.before.copy()
    trial.pass_.apply(again, PassContext(mesh=trial.ctx.mesh))
    assert _text(again) == _text(trial.after), "a second run on the same graph gives another one"


def _is_idempotent(trial: Trial) -> None:
    if not trial.pass_.idempotent:
        return
    again = trial.after.copy()
    outcome = trial.pass_.apply(again, trial.ctx)
    assert _text(again) == _text(trial.after), (
        f"a second application changes the graph again, to\n{_text(again)}"
    )
    assert not outcome.applied, f"a second application says that it did {outcome.applied[0]}"


def _survives_printing(trial: Trial) -> None:
    from graphopt.text import parse_graph

    text = _text(trial.after)
    parsed = parse_graph(text, dict(trial.after.module.named_buffers()))
    assert _text(parsed) == text, f"its text reads back as\n{_text(parsed)}"


OBLIGATIONS: Mapping[str, Callable[[Trial], None]] = {
    "verifies": _verifies,
    "reports": _reports,
    "keeps-signature": _keeps_signature,
    "same-results": _same_results,
    "no-new-aliases": _no_new_aliases,
    "is-deterministic": _is_deterministic,
    "is-idempotent": _is_idempotent,
    "survives-printing": _survives_printing,
}
"""What a pass owes for every graph, in the order in which it is checked."""


# -- helpers ---------------------------------------------------------------------------------------


def _check_options(pass_: Pass) -> None:
    from graphopt import registry
    from graphopt.spec import format_pass, options_of, parse_spec
    from graphopt.spec_values import format_value, parse_value

    assert dataclasses.is_dataclass(pass_), f"pass {pass_.name!r} is not a dataclass"
    for option in options_of(type(pass_)):
        value = getattr(pass_, option.name)
        text = format_value(value, option.kind)
        read = parse_value(text, option.kind)
        assert read == value, f"option {option.name}={value!r} prints as {text!r}, read as {read!r}"
    if pass_.name in registry.names():
        spec = format_pass(pass_)
        assert parse_spec(spec) == (pass_,), f"spec {spec!r} does not read back as {pass_!r}"


def _default_graphs(pass_: Pass) -> st.SearchStrategy[Graph]:
    strategies = {"joint": joint_graphs(), "inference": inference_graphs()}
    usable = [graphs for level, graphs in strategies.items() if level in pass_.levels]
    if not usable:
        raise ArgumentError(
            f"graphs of the levels of pass {pass_.name!r} cannot be generated",
            hint="give them as `graphs=`",
        )
    return st.one_of(usable)


def _aliases(graph: Graph, inputs: list[Tensor]) -> dict[object, str]:
    owners = {
        value.untyped_storage().data_ptr(): str(slot)
        for slot, value in zip(graph.signature.inputs, inputs, strict=True)
    }
    outputs = run_graph(graph, inputs)
    return {
        slot: owners.get(value.untyped_storage().data_ptr(), "")
        for slot, value in zip(graph.signature.outputs, outputs, strict=True)
    }


def _text(graph: Graph) -> str:
    from graphopt.text import print_graph

    return print_graph(graph)


def _message(
    pass_: Pass, obligation: str, before: Graph, after: Graph, seed: int, error: Exception
) -> str:
    from graphopt.spec import format_pass

    try:
        result = _text(after)
    except Exception as unprintable:  # a broken graph is what this message is about
        result = f"(not printable: {unprintable!r})\n{after.fx}"
    return (
        f"pass {pass_.name!r} fails {obligation!r}: {type(error).__name__}: {error}\n\n"
        f"spec: {format_pass(pass_)}\n"
        f"inputs: graphopt.testing.inputs_for(graph, seed={seed})\n\n"
        f"graph before:\n{_text(before)}\n\n"
        f"graph after:\n{result}"
    )
