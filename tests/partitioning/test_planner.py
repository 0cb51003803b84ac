"""Partitions and their certificates: properties, what happens beyond the cap, and bad input."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.errors import ArgumentError
from graphopt.partitioning.atoms import atoms_of
from graphopt.partitioning.downsets import downsets
from graphopt.partitioning.evaluate import evaluate
from graphopt.partitioning.objective import OBJECTIVES, Memory, Objective
from graphopt.partitioning.planner import plan
from graphopt.partitioning.problem import Link, Operator, Parameter, Problem, Value
from graphopt.partitioning.result import EXACT
from tests.support.partitions import all_partitions, cost, random_problem

PROBLEMS = st.builds(random_problem, st.integers(0, 10_000), st.integers(4, 9))


def branches(number: int, length: int) -> Problem:
    """Parallel branches between two operators: ``(length + 1) ** number`` downsets and two more."""
    operators = [Operator("in", 1.0)]
    values = []
    for b in range(number):
        last = "in"
        for i in range(length):
            name = f"b{b}.{i}"
            operators.append(Operator(name, 1.0 + (3 * b + 5 * i) % 7, 1.0, 1.0))
            values.append(Value(f"{last}>{name}", last, (name,), 1 + (b + i) % 3, 1))
            last = name
        values.append(Value(f"{last}>out", last, ("out",), 2, 2))
    operators.append(Operator("out", 1.0))
    return Problem(tuple(operators), tuple(values), link=Link(0.5, 0.0))


def chain(*seconds: float, saved: int = 0) -> Problem:
    operators = tuple(Operator(f"o{i}", s, saved=saved) for i, s in enumerate(seconds))
    values = tuple(Value(f"v{i}", f"o{i}", (f"o{i + 1}",), 1, 1) for i in range(len(operators) - 1))
    return Problem(operators, values)


# -- properties ------------------------------------------------------------------------------------


@given(PROBLEMS, st.integers(1, 3), st.sampled_from(OBJECTIVES), st.booleans(), st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_a_partition_is_what_it_says(
    problem: Problem, stages: int, kind: str, overlap: bool, batches: int
) -> None:
    objective = Objective(kind, batches, overlap)
    if len(atoms_of(problem)) < stages:
        return
    found = plan(problem, stages, objective)
    again = evaluate(problem, found.assignment, objective)
    assert again.value == found.value
    assert found.value == pytest.approx(cost(problem, found.assignment, stages, objective))
    assert found.assignment in list(all_partitions(problem, stages))
    certificate = found.certificate
    assert certificate is not None
    assert (certificate.proof, certificate.gap) == (EXACT, 0.0)
    assert sum(s.seconds for s in found.stages) >= problem.seconds * (1 - 1e-9)


@given(PROBLEMS, st.sampled_from(OBJECTIVES))
@settings(max_examples=30, deadline=None)
def test_slower_operators_never_help(problem: Problem, kind: str) -> None:
    objective = Objective(kind, 4)
    if len(atoms_of(problem)) < 2:
        return
    slower = replace(
        problem, operators=tuple(replace(o, forward=o.forward + 1) for o in problem.operators)
    )
    assert plan(slower, 2, objective).value >= plan(problem, 2, objective).value - 1e-9


@given(PROBLEMS, st.integers(2, 3), st.sampled_from(OBJECTIVES), st.integers(2, 12))
@settings(max_examples=40, deadline=None)
def test_certificate_beyond_the_cap_holds(
    problem: Problem, stages: int, kind: str, cap: int
) -> None:
    objective = Objective(kind, 4)
    if len(atoms_of(problem)) < stages:
        return
    best = plan(problem, stages, objective).value
    capped = plan(problem, stages, objective, cap=cap, bound_seconds=0.5)
    assert capped.certificate is not None
    assert capped.certificate.lower <= best * (1 + 1e-6)
    assert capped.value >= best * (1 - 1e-9)


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_wide_graphs_are_cut_well(kind: str) -> None:
    problem = branches(6, 7)
    assert downsets(atoms_of(problem)) is None
    objective = Objective(kind, 4)
    found = plan(problem, 3, objective, bound_seconds=0.0)
    certificate = found.certificate
    assert certificate is not None
    assert certificate.proof != EXACT
    assert certificate.gap < 0.1
    smaller = branches(3, 3)
    exact, capped = plan(smaller, 3, objective), plan(smaller, 3, objective, cap=20)
    assert capped.method != EXACT
    assert capped.value <= 1.25 * exact.value


def test_bound_of_the_program_proves_more_than_averages() -> None:
    """Three equal operators in two stages: the average says 1.5, the program 2."""
    problem = chain(1.0, 1.0, 1.0)
    found = plan(problem, 2, cap=1)
    assert found.certificate is not None
    assert found.value == 2.0
    assert found.certificate.lower == pytest.approx(2.0)


@pytest.mark.parametrize("kind", ["minmax", "gpipe"])
def test_of_equally_good_partitions_the_one_that_sends_least_is_taken(kind: str) -> None:
    operators = tuple(Operator(f"o{i}", s) for i, s in enumerate((2.0, 8.0, 0.0, 0.0, 0.0, 2.0)))
    sizes = (4, 5, 3, 1, 2)
    values = tuple(Value(f"v{i}", f"o{i}", (f"o{i + 1}",), n) for i, n in enumerate(sizes))
    found = plan(Problem(operators, values, link=Link(0.1, 0.0)), 3, Objective(kind))
    assert found.value == 8.0
    assert [cut.bytes for cut in found.cuts] == [4, 1]


# -- shared parameters -----------------------------------------------------------------------------


def _tied(size: int) -> Problem:
    """An embedding at both ends of a chain, which balances best when it is in two stages."""
    operators = tuple(
        Operator(f"o{i}", 4.0, parameters=("e",) if i in (0, 3) else ()) for i in range(4)
    )
    values = tuple(Value(f"v{i}", f"o{i}", (f"o{i + 1}",), 1, 1) for i in range(3))
    return Problem(operators, values, (Parameter("e", size),), link=Link(1.0, 0.0))


def test_shared_gradients_are_reduced_where_that_is_cheaper() -> None:
    cheap = plan(_tied(1), 2, Objective(micro_batches=4))
    assert [len(s.operators) for s in cheap.stages] == [2, 2]
    (shared,) = cheap.shared
    assert (shared.name, shared.stages, shared.seconds) == ("e", (0, 1), 2.0)
    assert cheap.value == 8.0 + 2.0 / 4


def test_shared_parameters_are_colocated_where_that_is_cheaper() -> None:
    operators = (*_tied(40).operators, Operator("o4", 14.0))
    values = (*_tied(40).values, Value("v3", "o3", ("o4",), 1, 1))
    problem = replace(_tied(40), operators=operators, values=values)
    dear = plan(problem, 2, Objective(micro_batches=4))
    assert dear.shared == ()
    assert [len(s.operators) for s in dear.stages] == [4, 1]
    assert dear.value == 16.0


# -- bad input -------------------------------------------------------------------------------------


def test_too_little_memory_names_the_stage_and_by_how_much() -> None:
    problem = chain(1.0, 1.0, 1.0, 1.0, saved=10)
    objective = Objective(micro_batches=4, memory=Memory(25.0))
    with pytest.raises(ArgumentError) as caught:
        plan(problem, 2, objective)
    # 1F1B holds two micro-batches in the first of two stages and one in the second.
    assert caught.value.message == (
        "no partition into 2 stages fits into memory: in the one that comes closest, stage 1 needs "
        "30 bytes, 5 more than its limit of 25"
    )
    assert caught.value.where == "stage 1: o1 … o3"


@pytest.mark.parametrize(
    ("stages", "objective", "message"),
    [
        (0, Objective(), "there cannot be 0 stages"),
        (5, Objective(), "5 stages are more than the 4 operators"),
        (2, Objective(memory=Memory((1.0,))), "1 limits of memory are given for 2 stages"),
    ],
)
def test_impossible_requests(stages: int, objective: Objective, message: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        plan(chain(1.0, 1.0, 1.0, 1.0), stages, objective)
    assert caught.value.message == message


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Objective("fastest"), "there is no objective 'fastest'"),
        (lambda: Objective(micro_batches=0), "a step cannot have 0 micro-batches"),
        (lambda: Objective(memory=Memory(schedule="x")), "there is no schedule 'x'"),
        (lambda: chain(1.0, -1.0), "-1.0 is not a time or a size"),
        (lambda: chain(math.nan), "nan is not a time or a size"),
        (lambda: Problem((Operator("a", 1), Operator("a", 1))), "there are two operators 'a'"),
        (
            lambda: Problem((Operator("a", 1),), (Value("v", "a", ("b",), 1),)),
            "there is no operator 'b'",
        ),
        (
            lambda: Problem((Operator("a", 1), Operator("b", 1)), (Value("v", "b", ("a",), 1),)),
            "operator 'a' reads what 'b' makes after it",
        ),
        (lambda: Problem((Operator("a", 1, parameters=("w",)),)), "there is no parameter 'w'"),
        (
            lambda: Problem((Operator("a", 1),), (Value("v", "", (), 1, saved_by=("a",)),)),
            "there is no maker or reader 'a'",
        ),
    ],
)
def test_bad_problems(make: object, message: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        make()  # type: ignore[operator]
    assert caught.value.message == message


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ([0, 0], "2 stages are given for 3 operators"),
        ([0, 2, 2], "stage 1 has no operator"),
        ([1, 0, 1], "stage 0 reads what stage 1 makes"),
        ({"o0": 0, "o1": 0}, "operator 'o2' has no stage"),
    ],
)
def test_bad_partitions(assignment: list[int] | dict[str, int], message: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        evaluate(chain(1.0, 1.0, 1.0), assignment, Objective())
    assert caught.value.message == message


def test_what_is_between_operators_that_are_together_joins_them() -> None:
    problem = replace(chain(1.0, 1.0, 1.0, 1.0), together=(frozenset({"o0", "o2"}),))
    assert [len(s.operators) for s in plan(problem, 2).stages] == [3, 1]
    with pytest.raises(ArgumentError) as caught:
        plan(problem, 3)
    assert caught.value.message == "3 stages are more than the 2 operators that can be separated"
    with pytest.raises(ArgumentError) as caught:
        evaluate(problem, [0, 0, 1, 1], Objective())
    assert caught.value.message == "operators that must be together are in different stages"
