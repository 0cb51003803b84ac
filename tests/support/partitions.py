"""Random problems for partitioning, and an oracle that shares no code with the package."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator

from graphopt.partitioning.objective import ALPA, GPIPE, Objective
from graphopt.partitioning.problem import Link, Operator, Parameter, Problem, Value


def random_problem(seed: int, count: int, *, edges: float = 0.25) -> Problem:
    """Whole seconds and bytes, so that equal sums are equal numbers."""
    draw = random.Random(seed)
    parameters = tuple(
        Parameter(f"p{i}", draw.randint(1, 9), trained=draw.random() < 0.8) for i in range(3)
    )
    operators = tuple(
        Operator(
            f"o{i}",
            float(draw.randint(0, 9)),
            float(draw.randint(0, 9)),
            float(draw.randint(0, 9)),
            parameters=tuple(p.name for p in parameters if draw.random() < 0.2),
            saved=draw.randint(0, 4),
        )
        for i in range(count)
    )
    values = []
    for i in range(count):
        readers = tuple(f"o{j}" for j in range(i + 1, count) if draw.random() < edges)
        own = (f"o{i}",) if draw.random() < 0.3 else ()
        savers = own + tuple(r for r in readers if draw.random() < 0.5)
        values.append(
            Value(
                f"v{i}",
                f"o{i}",
                readers,
                draw.randint(0, 5),
                draw.randint(0, 5),
                saved_by=savers,
                final=i == count - 1 or draw.random() < 0.05,
            )
        )
    fed = tuple(f"o{j}" for j in range(count) if draw.random() < 0.2)
    values.append(Value("x", "", fed, draw.randint(1, 5)))
    together: tuple[frozenset[str], ...] = ()
    if draw.random() < 0.3:
        together = (frozenset(o.name for o in draw.sample(operators, 2)),)
    link = Link(draw.choice([0.0, 1.0]), draw.choice([0.0, 0.0, 1.0]))
    return Problem(operators, tuple(values), parameters, together, link)


def all_partitions(problem: Problem, stages: int) -> Iterator[dict[str, int]]:
    """Every way to put operators into stages that a pipeline can run."""
    names = [o.name for o in problem.operators]
    arrows = [(v.maker, r) for v in problem.values if v.maker for r in v.readers]
    for choice in itertools.product(range(stages), repeat=len(names)):
        stage = dict(zip(names, choice, strict=True))
        if len(set(choice)) < stages or any(stage[a] > stage[b] for a, b in arrows):
            continue
        if all(len({stage[name] for name in group}) == 1 for group in problem.together):
            yield stage


def cost(problem: Problem, stage: dict[str, int], k: int, objective: Objective) -> float:
    """The objective by definition; infinite where a stage exceeds its memory."""
    f, b = [0.0] * k, [0.0] * k
    for o in problem.operators:
        f[stage[o.name]] += o.forward
        b[stage[o.name]] += o.input_grad + o.weight_grad
    weight = {p.name: p for p in problem.parameters}
    uses: dict[str, set[int]] = {name: set() for name in weight}
    for o in problem.operators:
        for name in o.parameters:
            uses[name].add(stage[o.name])
    link = problem.link
    for name, where in uses.items():
        if len(where) > 1 and weight[name].trained and weight[name].bytes:
            for s in where:
                once = 2 * (link.latency + link.seconds_per_byte * weight[name].bytes)
                b[s] += once / objective.micro_batches
    for s in range(k):
        if _holds(problem, stage, k, s, uses, objective) > objective.memory.limit_of(s):
            return math.inf
    there, back = [], []
    for c in range(k - 1):
        sizes = [0, 0]
        for v in problem.values:
            made = stage[v.maker] if v.maker else 0
            later = [r for r in v.readers if stage[r] > c]
            if made <= c and (later or v.final):
                sizes[0] += v.bytes
                sizes[1] += v.gradient
        there.append(link.latency + link.seconds_per_byte * sizes[0] if sizes[0] else 0.0)
        back.append(link.latency + link.seconds_per_byte * sizes[1] if sizes[1] else 0.0)
    total = sum(f) + sum(b) + sum(there) + sum(back)
    if objective.overlap:
        whole = [x + y for x, y in zip(f, b, strict=True)]
        whole += [x + y for x, y in zip(there, back, strict=True)]
        f, b = f + there, b + back
    else:
        f = [x + sum(there[max(0, s - 1) : s + 1]) for s, x in enumerate(f)]
        b = [x + sum(back[max(0, s - 1) : s + 1]) for s, x in enumerate(b)]
        whole = [x + y for x, y in zip(f, b, strict=True)]
    if objective.kind == GPIPE:
        return max(f) + max(b)
    if objective.kind == ALPA:
        return total + (objective.micro_batches - 1) * max(whole)
    return max(whole)


def _holds(
    problem: Problem,
    stage: dict[str, int],
    k: int,
    s: int,
    uses: dict[str, set[int]],
    objective: Objective,
) -> float:
    m, memory = objective.micro_batches, objective.memory
    flying = {
        "gpipe": m,
        "1f1b": min(m, k - s),
        "zero_bubble": min(m, k),
        "no_flush": min(m, 2 * (k - 1 - s) + 1),
        "no_flush_1f1b": min(m, k - s),
    }[memory.schedule]
    late = {"no_flush": 2 * (k - 1 - s), "no_flush_1f1b": k - 1 - s}.get(memory.schedule, 0)
    held = 0.0
    for o in problem.operators:
        held += flying * o.saved * (stage[o.name] == s)
    for v in problem.values:
        held += flying * v.bytes * any(stage[name] == s for name in v.saved_by)
    for p in problem.parameters:
        if s in uses[p.name]:
            copies = 2 + memory.state + (late if memory.stash else 0)
            held += p.bytes * (copies if p.trained else 1)
    return held


def brute_force(problem: Problem, stages: int, objective: Objective) -> float:
    """The least cost over every partition."""
    found = [cost(problem, p, stages, objective) for p in all_partitions(problem, stages)]
    return min(found, default=math.inf)
