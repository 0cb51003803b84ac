"""The best stages of a pipeline, with a certificate.

A problem with few downsets is solved exactly. One with too many is made narrower in two ways, by
contracting chains and by fixing the order within wide regions, for several orders; the best result
is kept and held against a lower bound.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

from graphopt.errors import ArgumentError
from graphopt.partitioning.atoms import Atoms, atoms_of
from graphopt.partitioning.bounds import bounds_of
from graphopt.partitioning.downsets import CAP, downsets, prefixes
from graphopt.partitioning.dynamic import Search
from graphopt.partitioning.evaluate import evaluate
from graphopt.partitioning.milp import solve_milp
from graphopt.partitioning.narrowing import chained, contracted_chains
from graphopt.partitioning.objective import Objective
from graphopt.partitioning.orders import orders
from graphopt.partitioning.problem import Problem
from graphopt.partitioning.result import EXACT, Certificate, Partition
from graphopt.partitioning.solve import solve, worth
from graphopt.partitioning.space import Space

QUICK_ORDERS = 3  # orders whose best partition bounds the exact search


def plan(
    problem: Problem,
    stages: int,
    objective: Objective | None = None,
    *,
    cap: int = CAP,
    bound_seconds: float = 10.0,
) -> Partition:
    """Cut a problem into stages.

    Args:
        problem: operators, values, parameters.
        stages: how many; none is empty.
        objective: what to minimise; by default the slowest stage.
        cap: with at most so many downsets the search is exact.
        bound_seconds: how long to look for a bound where it is not.

    Returns:
        The partition; its certificate says how good it is.

    Raises:
        ArgumentError: there are fewer operators than stages, a number of limits that is not that
            of the stages, or no partition within the limits of memory.
    """
    started = time.perf_counter()
    objective = objective or Objective()
    atoms = atoms_of(problem)
    _check(problem, atoms, stages, objective)
    upper = math.inf
    quick: list[tuple[str, Atoms, tuple[int, ...], float]] = []
    for name, order in _some(orders(atoms)):
        found = _solved(problem, atoms, prefixes(order), stages, objective, upper)
        if found is not None:
            quick.append((f"prefixes of one order ({name})", atoms, *found))
            upper = found[1]
    masks = downsets(atoms, cap)
    if masks is not None:
        exact = _solved(problem, atoms, masks, stages, objective, upper)
        if exact is None:
            raise _no_room(problem, atoms, masks, stages, objective)
        best = evaluate(problem, atoms.assignment(exact[0]), objective, method=EXACT)
        certificate = Certificate(best.value, best.value, EXACT)
    else:
        found_all = [*quick, *_narrowed(problem, atoms, stages, objective, cap, upper)]
        if not found_all:
            every = prefixes(range(len(atoms)))
            raise _no_room(problem, atoms, every, stages, objective)
        method, its_atoms, bounds, _ = min(found_all, key=lambda f: f[3])
        best = evaluate(problem, its_atoms.assignment(bounds), objective, method=method)
        certificate = _bounded(problem, atoms, stages, objective, best.value, bound_seconds)
    seconds = time.perf_counter() - started
    return replace(best, certificate=certificate, solve_seconds=seconds)


def _narrowed(
    problem: Problem, atoms: Atoms, stages: int, objective: Objective, cap: int, upper: float
) -> Iterator[tuple[str, Atoms, tuple[int, ...], float]]:
    """Partitions of narrower problems."""
    together = contracted_chains(atoms, stages)
    chains = atoms_of(problem, together=together)
    masks = downsets(chains, cap) if len(chains) >= stages else None
    if masks is not None:
        found = _solved(problem, chains, masks, stages, objective, upper)
        if found is not None:
            yield "contracted chains", chains, *found
        return
    for name, order in orders(atoms):
        narrow = atoms_of(problem, edges=chained(atoms, order, cap))
        masks = downsets(narrow, cap)
        if masks is None:
            continue
        found = _solved(problem, narrow, masks, stages, objective, upper)
        if found is not None:
            upper = min(upper, found[1])
            yield f"wide regions in one order ({name})", narrow, *found


def _solved(
    problem: Problem,
    atoms: Atoms,
    masks: Sequence[int],
    stages: int,
    objective: Objective,
    upper: float,
) -> tuple[tuple[int, ...], float] | None:
    space = Space(atoms, masks, problem.link, objective, limited=_limited(objective))
    chain = solve(space, stages, bounds_of(atoms, stages), upper)
    return None if chain is None else (chain.bounds, worth(chain, objective))


def _bounded(
    problem: Problem,
    atoms: Atoms,
    stages: int,
    objective: Objective,
    value: float,
    seconds: float,
) -> Certificate:
    """The better one of the simple bound and that of the mixed-integer program."""
    simple = bounds_of(atoms, stages).of(objective)
    if seconds <= 0 or value <= simple:
        return Certificate(value, min(simple, value), "averages and the largest operator")
    solved = solve_milp(atoms, stages, problem.link, objective, seconds=seconds)
    if solved.lower <= simple:
        return Certificate(value, min(simple, value), "averages and the largest operator")
    return Certificate(value, min(solved.lower, value), "bound of a mixed-integer program")


def _limited(objective: Objective) -> bool:
    limit = objective.memory.limit
    return any(x < math.inf for x in limit) if isinstance(limit, tuple) else limit < math.inf


def _some(
    every: Iterator[tuple[str, list[int]]],
) -> Iterator[tuple[str, list[int]]]:
    for _, item in zip(range(QUICK_ORDERS), every, strict=False):
        yield item


def _no_room(
    problem: Problem, atoms: Atoms, masks: Sequence[int], stages: int, objective: Objective
) -> ArgumentError:
    """The error for limits that no partition meets: the one that comes closest says where."""
    space = Space(atoms, masks, problem.link, objective, limited=True)
    chain = Search(space, stages, obey=False).best("excess")
    if chain is None:  # unreachable with as many atoms as stages
        return ArgumentError(f"there is no partition into {stages} stages", where="stages")
    closest = evaluate(problem, atoms.assignment(chain.bounds), objective)
    number, stage = max(enumerate(closest.stages), key=lambda s: s[1].excess)
    return ArgumentError(
        f"no partition into {stages} stages fits into memory: in the one that comes closest, "
        f"stage {number} needs {stage.memory:,.0f} bytes, {stage.excess:,.0f} more than its limit "
        f"of {stage.limit:,.0f}",
        where=f"stage {number}: {stage.operators[0]} … {stage.operators[-1]}",
        hint="take more stages, fewer micro-batches in flight, or a higher limit",
    )


def _check(problem: Problem, atoms: Atoms, stages: int, objective: Objective) -> None:
    if stages < 1:
        raise ArgumentError(f"there cannot be {stages} stages", where="stages")
    if len(atoms) < stages:
        kept = len(problem.operators) - len(atoms)
        because = " that can be separated" if kept else ""
        raise ArgumentError(
            f"{stages} stages are more than the {len(atoms)} operators{because}",
            where="stages",
            hint=f"ask for at most {len(atoms)}",
        )
    limit = objective.memory.limit
    if isinstance(limit, tuple) and len(limit) != stages:
        raise ArgumentError(
            f"{len(limit)} limits of memory are given for {stages} stages",
            where="memory",
            hint="give one per stage, or a single number",
        )
