"""Pipelines: order checked when built, promises checked when run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest

from graphopt.errors import ArgumentError, InvariantError, PipelineError, SpecError
from graphopt.graph import Graph
from graphopt.passbase import EXACT, Applied, Outcome, Pass, PassContext
from graphopt.pipeline import Pipeline
from graphopt.plan import Role, Signature, Slot
from graphopt.text import parse_graph, print_graph
from tests.support.demo_passes import Canonical, Factors, Idle, Lower, Marks, UsesFactors
from tests.support.graphs import aten, inference_graph, linear_graph
from tests.support.plugins import write_demo_passes

DONE = Outcome(applied=(Applied("here", "did it"),))


@dataclass(frozen=True)
class Does(Pass):
    """A pass that runs a function given by the test."""

    name: ClassVar[str] = "does"
    action: ClassVar[Callable[[Graph], object]]

    def apply(self, graph: Graph, ctx: PassContext) -> Outcome:
        return type(self).action(graph)


def does(action: Callable[[Graph], object], **declared: object) -> Pass:
    return type("Does", (Does,), {"action": staticmethod(action), **declared})()


def node(graph: Graph, name: str):
    return next(n for n in graph.nodes if n.name == name)


@pytest.fixture
def _plugins(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(write_demo_passes(tmp_path))


# -- order -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "passes",
    [
        (),
        (Idle(), Idle()),
        (Canonical(), Factors(), Lower()),
        (Canonical(), Canonical(), Factors(), Factors(), UsesFactors(), UsesFactors()),
    ],
)
def test_possible_orders(passes):
    assert Pipeline(passes).passes == passes


def test_a_needed_fact_that_comes_too_late():
    with pytest.raises(PipelineError) as caught:
        Pipeline((Idle(), UsesFactors(), Factors(), Canonical()))
    assert caught.value.message == (
        "pass 'uses_factors' needs 'factored', which 'factors' provides only after it"
    )
    assert caught.value.hint == "this order works: idle,canonical,factors,uses_factors"


def test_a_conflict_names_both_passes():
    with pytest.raises(PipelineError) as caught:
        Pipeline((Canonical(), Lower(), Factors()))
    assert caught.value.message == (
        "pass 'factors' must run before 'lower', "
        "because the graph must not be 'lowered' yet when it runs"
    )
    assert caught.value.hint == "this order works: canonical,factors,lower"


def test_no_order_works():
    lowers_and_is_needed = does(lambda graph: DONE, provides=frozenset({"tidy", "lowered"}))
    with pytest.raises(PipelineError, match="must run before 'does'") as caught:
        Pipeline((lowers_and_is_needed, Factors()))
    assert "no order of these passes works" in caught.value.hint


@pytest.mark.usefixtures("_plugins")
def test_a_missing_pass_is_named_from_all_known_ones():
    with pytest.raises(PipelineError) as caught:
        Pipeline.parse("idle,factors")
    assert caught.value.message == (
        "pass 'factors' needs 'tidy', which 'canonical' provides, but that is not in the pipeline"
    )
    assert caught.value.hint == "put 'canonical' before it: canonical,idle,factors"


def test_a_fact_that_nothing_provides():
    with pytest.raises(PipelineError, match="needs 'magic', which no pass provides"):
        Pipeline((does(lambda graph: DONE, requires=frozenset({"magic"})),))


def test_captured_is_given():
    Pipeline((does(lambda graph: DONE, requires=frozenset({"captured"})),))


def test_observers_are_not_part_of_equality():
    assert Pipeline((Idle(),), observers=(print,)) == Pipeline((Idle(),))


# -- running ---------------------------------------------------------------------------------------


def negate_twice(graph: Graph) -> Outcome:
    y = node(graph, "mm")
    with graph.fx.inserting_after(y):
        first = graph.fx.call_function(aten.neg.default, (y,))
    with graph.fx.inserting_after(first):
        second = graph.fx.call_function(aten.neg.default, (first,))
    for new in (first, second):
        new.meta.update(y.meta)
    graph.output.replace_input_with(y, second)
    return DONE


def test_steps_say_what_happened():
    graph = linear_graph()
    version = graph.version
    steps = Pipeline((Canonical(), does(negate_twice))).run(graph)
    assert [step.spec for step in steps] == ["canonical", "does"]
    assert [(step.nodes_before, step.nodes_after) for step in steps] == [(7, 7), (7, 9)]
    assert [step.outcome for step in steps] == [Outcome(), DONE]
    assert all(step.seconds > 0 and step.numerics is EXACT and not step.skipped for step in steps)
    assert graph.version == version + 1
    assert graph.facts == {"captured", "tidy"}
    assert "neg" in graph.module.code


def test_context_reaches_the_pass():
    seen = []

    class Sees(Idle):
        def apply(self, graph, ctx):
            seen.append(ctx)
            return Outcome()

    context = PassContext(mesh={"dp": 8})
    Pipeline((Sees(),)).run(linear_graph(), context)
    Pipeline((Sees(),)).run(linear_graph())
    assert seen == [replace(context, running="idle"), PassContext(running="idle")]


def test_a_pass_of_another_level_is_skipped_with_its_dependents():
    graph = inference_graph()
    steps = Pipeline((Canonical(), Factors(), UsesFactors(), Idle())).run(graph)
    assert [step.skipped for step in steps] == [
        "",
        "it works on joint graphs and this is a graph of level inference",
        "it needs 'factored', whose provider was skipped",
        "",
    ]
    assert graph.facts == {"captured", "tidy"}


def test_observers_see_each_step():
    seen = []

    class Watcher:
        def before(self, index, pass_, graph):
            seen.append(("before", index, pass_.name, len(graph)))

        def __call__(self, index, pass_, graph, step):
            seen.append(("after", index, pass_.name, len(graph), bool(step.skipped)))

    passes = (Canonical(), Factors(), does(negate_twice))
    graph = linear_graph()
    steps = []
    observers = (Watcher(), lambda index, pass_, graph, step: steps.append(step))
    returned = Pipeline(passes, observers).run(graph)
    assert tuple(steps) == returned
    assert seen == [
        ("before", 0, "canonical", 7),
        ("after", 0, "canonical", 7, False),
        ("before", 1, "factors", 7),
        ("after", 1, "factors", 7, False),
        ("before", 2, "does", 7),
        ("after", 2, "does", 9, False),
    ]
    seen.clear()
    Pipeline((Canonical(), Factors()), (Watcher(),)).run(inference_graph())
    assert seen[2:] == [("after", 1, "factors", 5, True)]


# -- promises --------------------------------------------------------------------------------------


def forget_value(graph: Graph) -> Outcome:
    del node(graph, "mm").meta["val"]
    return DONE


def false_value(graph: Graph) -> Outcome:
    node(graph, "t").meta["val"] = node(graph, "mm").meta["val"]
    return DONE


def fails_with(
    passes: tuple[Pass, ...], graph: Graph | None = None, verify="structure", kind=PipelineError
):
    with pytest.raises(kind) as caught:
        Pipeline(passes).run(graph or linear_graph(), verify=verify)
    return caught.value


def test_an_illegal_graph_is_refused_before_the_first_pass():
    graph = linear_graph()
    forget_value(graph)
    with pytest.raises(InvariantError):
        Pipeline((Idle(),)).run(graph)


def test_an_illegal_result_blames_the_pass():
    error = fails_with((Idle(), Marks(), does(forget_value), Idle()), kind=InvariantError)
    assert error.message.startswith(
        "pass 'does' (after idle, marks) failed: invariant 'values' is broken: node 'mm'"
    )
    assert "aten.mm" in error.where
    assert isinstance(error.__cause__, InvariantError)


def test_verify_levels():
    passes = (does(false_value), Idle())
    Pipeline(passes).run(linear_graph(), verify="structure")
    Pipeline((does(forget_value),)).run(linear_graph(), verify="off")
    assert (
        "invariant 'true-values'" in fails_with(passes, verify="full", kind=InvariantError).message
    )
    with pytest.raises(ArgumentError, match="verify='eager' is not a level"):
        Pipeline(passes).run(linear_graph(), verify="eager")


def test_the_graph_is_verified_once_between_passes(monkeypatch):
    calls = []
    monkeypatch.setattr(
        "graphopt.pipeline.pipeline.verify_graph", lambda graph, full: calls.append(full)
    )
    Pipeline((Idle(), does(negate_twice), Idle(), Marks())).run(linear_graph(), verify="full")
    assert calls == [True] * 3  # before the first pass, and after the two that say they applied
    calls.clear()
    Pipeline((Marks(),)).run(linear_graph(), verify="off")
    Pipeline(()).run(linear_graph())
    assert calls == []


def test_an_exception_is_wrapped_with_its_cause():
    def divide(graph):
        return 1 / 0

    error = fails_with((Idle(), does(divide)))
    assert error.message == "pass 'does' (after idle) failed: ZeroDivisionError: division by zero"
    assert isinstance(error.__cause__, ZeroDivisionError)


def test_an_error_of_graphopt_keeps_type_place_and_hint():
    def refuse(graph):
        raise SpecError("no such layer", where="keep=x", hint="use y")

    error = fails_with((does(refuse),), kind=SpecError)
    assert error.message == "pass 'does' failed: no such layer"
    assert (error.where, error.hint) == ("keep=x", "use y")


def test_an_interrupt_is_not_wrapped():
    def interrupt(graph):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Pipeline((does(interrupt),)).run(linear_graph())


def test_a_result_that_is_no_outcome():
    assert "returned None, not an Outcome" in fails_with((does(lambda graph: None),)).message


def test_a_conflict_with_what_an_earlier_pipeline_provided():
    graph = linear_graph()
    Pipeline((Lower(),)).run(graph)
    error = fails_with((Canonical(), Factors()), graph)
    assert error.message.endswith("must not run on a graph that is 'lowered' already")


def drop_gradient(graph: Graph) -> Outcome:
    slots = graph.signature.outputs
    graph.set_outputs({slots[0]: graph.outputs[0]})
    return DONE


def rename_input(graph: Graph) -> Outcome:
    others = graph.signature.inputs[1:]
    graph.signature = Signature((Slot(Role.PARAM, "v"), *others), graph.signature.outputs)
    return DONE


def test_the_signature_is_kept_unless_declared():
    for action in (drop_gradient, rename_input):
        error = fails_with((does(action),))
        assert error.message.endswith("it changed the signature and does not declare that")
    graph = linear_graph()
    Pipeline((does(drop_gradient, changes_signature=True),)).run(graph)
    assert len(graph.outputs) == 1


def secretly(change: Callable[[Graph], object]) -> Pass:
    def action(graph: Graph) -> Outcome:
        change(graph)
        return Outcome()

    return does(action, changes_signature=True)


def swap_target(graph: Graph) -> None:
    node(graph, "t").target = aten.transpose_copy.int


def swap_argument(graph: Graph) -> None:
    mm = node(graph, "mm_1")
    mm.args = tuple(reversed(mm.args))


def set_keyword(graph: Graph) -> None:
    node(graph, "t").kwargs = {"x": 1}


def swap_order(graph: Graph) -> None:
    node(graph, "t").append(node(graph, "mm"))


def swap_phase(graph: Graph) -> None:
    node(graph, "t").meta["partitioner_tag"] = "is_forward"


@pytest.mark.parametrize(
    "change",
    [
        negate_twice,
        swap_target,
        swap_argument,
        set_keyword,
        swap_order,
        swap_phase,
        false_value,
        forget_value,
        drop_gradient,
        rename_input,
    ],
)
def test_a_change_that_is_not_reported(change):
    error = fails_with((secretly(change),))
    assert error.message.endswith("it changed the graph, but its outcome has nothing applied")


def test_rewriting_with_equal_arguments_is_no_change():
    def same(graph):
        for n in graph.nodes:
            n.args, n.kwargs = tuple(n.args), dict(n.kwargs)

    Pipeline((secretly(same),)).run(linear_graph())


SYMBOLIC = """gopt 1 inference torch 2.13
symbol s0 = 4 from 2

forward inputs
  %x_0 = size "x.0" : int s0
  %x = input "x" : f32[s0,3]

forward
  %sub = operator.add(%x_0, -1) : int (-1)+s0
  %slice_1 = aten.slice.Tensor(%x, 0, 0, %sub) : f32[(-1)+s0,3]
  %neg = aten.neg.default(%slice_1) : f32[(-1)+s0,3]

forward outputs
  output "0" = %neg

end
"""


def test_a_pass_that_takes_no_symbols_refuses_them():
    graph = parse_graph(SYMBOLIC)
    with pytest.raises(PipelineError, match=r"pass 'does' failed: .* fixed sizes only, and x\.0"):
        Pipeline((does(lambda graph: Outcome()),)).run(graph)
    assert print_graph(graph) == SYMBOLIC
    Pipeline((does(lambda graph: Outcome(), symbolic=True),)).run(graph)
