"""What a given partition costs, straight from the definitions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from graphopt.errors import ArgumentError
from graphopt.partitioning.objective import ALPA, GPIPE, Objective
from graphopt.partitioning.problem import Operator, Problem, Value
from graphopt.partitioning.result import Cut, Partition, Shared, Stage


def evaluate(
    problem: Problem,
    assignment: Mapping[str, int] | Sequence[int],
    objective: Objective,
    *,
    method: str = "",
) -> Partition:
    """Times, memory, cuts and value of a partition; memory limits are reported, not enforced.

    Args:
        problem: what is cut.
        assignment: the stage of each operator, from 0: by name, or in the order of the problem.
        objective: what is minimised.
        method: how it was found, for reports.

    Raises:
        ArgumentError: an operator has no stage, a stage is empty, a value flows backwards, or
            operators that must be together are not.
    """
    stage_of = _stages(problem, assignment)
    count = max(stage_of.values()) + 1
    check(problem, stage_of, count)
    cuts = tuple(_cut(problem, stage_of, s) for s in range(count - 1))
    shared = _shared(problem, stage_of)
    stages = tuple(_stage(problem, stage_of, objective, count, s, shared) for s in range(count))
    return Partition(stages, cuts, shared, value_of(stages, cuts, objective), method)


def value_of(stages: Sequence[Stage], cuts: Sequence[Cut], objective: Objective) -> float:
    """The objective's value."""
    forward = [s.forward for s in stages]
    backward = [s.backward for s in stages]
    whole = [s.seconds for s in stages]
    crossing = [c.forward + c.backward for c in cuts]
    latency = math.fsum((*whole, *crossing))
    if objective.overlap:
        forward += [c.forward for c in cuts]
        backward += [c.backward for c in cuts]
        whole += crossing
    else:
        for s, cut in enumerate(cuts):
            for side in (s, s + 1):
                forward[side] += cut.forward
                backward[side] += cut.backward
                whole[side] += cut.forward + cut.backward
    if objective.kind == GPIPE:
        return max(forward) + max(backward)
    if objective.kind == ALPA:
        return latency + (objective.micro_batches - 1) * max(whole)
    return max(whole)


def reduction_seconds(problem: Problem, size: int) -> float:
    """Seconds of adding up one shared gradient, per step and stage.

    Each stage sends its gradient once and receives the sum once.
    """
    return 2 * problem.link.seconds(size)


def crosses(value: Value, stage_of: Mapping[str, int], cut: int) -> bool:
    """Whether a value crosses from stage `cut` to the next one."""
    made = stage_of[value.maker] if value.maker else 0
    return made <= cut and (value.final or any(stage_of[r] > cut for r in value.readers))


def check(problem: Problem, stage_of: Mapping[str, int], count: int) -> None:
    """Refuse a partition that no pipeline can run."""
    empty = sorted(set(range(count)) - set(stage_of.values()))
    if empty:
        raise ArgumentError(
            f"stage {empty[0]} has no operator", where="stages", hint="ask for fewer stages"
        )
    for value in problem.values:
        made = stage_of[value.maker] if value.maker else 0
        for reader in value.readers:
            if stage_of[reader] < made:
                raise ArgumentError(
                    f"stage {stage_of[reader]} reads what stage {made} makes",
                    where=f"value {value.name!r}, read by {reader!r}",
                    hint="put a reader into the stage of the maker, or a later one",
                )
    for group in problem.together:
        if len({stage_of[name] for name in group}) > 1:
            raise ArgumentError(
                "operators that must be together are in different stages",
                where=", ".join(sorted(group)),
            )


def _stages(problem: Problem, assignment: Mapping[str, int] | Sequence[int]) -> dict[str, int]:
    names = [o.name for o in problem.operators]
    if not names:
        raise ArgumentError("there is no operator", where="problem")
    if not isinstance(assignment, Mapping):
        if len(assignment) != len(names):
            raise ArgumentError(
                f"{len(assignment)} stages are given for {len(names)} operators",
                where="assignment",
                hint="give one per operator",
            )
        assignment = dict(zip(names, assignment, strict=True))
    missing = [name for name in names if assignment.get(name, -1) < 0]
    if missing:
        raise ArgumentError(f"operator {missing[0]!r} has no stage", where="assignment")
    return {name: assignment[name] for name in names}


def _cut(problem: Problem, stage_of: Mapping[str, int], cut: int) -> Cut:
    values = [v for v in problem.values if crosses(v, stage_of, cut)]
    size, gradient = sum(v.bytes for v in values), sum(v.gradient for v in values)
    link = problem.link
    names = tuple(v.name for v in values)
    return Cut(names, size, gradient, link.seconds(size), link.seconds(gradient))


def _shared(problem: Problem, stage_of: Mapping[str, int]) -> tuple[Shared, ...]:
    users: dict[str, set[int]] = {p.name: set() for p in problem.parameters}
    for o in problem.operators:
        for name in o.parameters:
            users[name].add(stage_of[o.name])
    return tuple(
        Shared(p.name, tuple(sorted(users[p.name])), reduction_seconds(problem, p.bytes))
        for p in problem.parameters
        if p.trained and len(users[p.name]) > 1
    )


def _stage(
    problem: Problem,
    stage_of: Mapping[str, int],
    objective: Objective,
    count: int,
    s: int,
    shared: Sequence[Shared],
) -> Stage:
    own: list[Operator] = [o for o in problem.operators if stage_of[o.name] == s]
    names = {o.name for o in own}
    saved = sum(o.saved for o in own)
    saved += sum(v.bytes for v in problem.values if names.intersection(v.saved_by))
    read = {name for o in own for name in o.parameters}
    parameters = [p for p in problem.parameters if p.name in read]
    trained = sum(p.bytes for p in parameters if p.trained)
    total = sum(p.bytes for p in parameters)
    memory = objective.memory
    flying = memory.in_flight(count, s, objective.micro_batches)
    held = saved * flying + trained * memory.copies(count, s) + (total - trained)
    return Stage(
        operators=tuple(o.name for o in own),
        forward=math.fsum(o.forward for o in own),
        input_grad=math.fsum(o.input_grad for o in own),
        weight_grad=math.fsum(o.weight_grad for o in own),
        reduction=math.fsum(x.seconds for x in shared if s in x.stages) / objective.micro_batches,
        saved=saved,
        parameters=tuple(p.name for p in parameters),
        parameter_bytes=total,
        in_flight=flying,
        memory=held,
        limit=memory.limit_of(s),
    )
