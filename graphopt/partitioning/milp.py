"""The same problem as a mixed-integer program for HiGHS: a second solver, and a bound.

``y[v, s]`` says that atom v is in stage s or an earlier one. It grows with s, and is not larger
than that of a predecessor. A flow crosses cut s where its maker is in and one of its readers is
out.
"""

from __future__ import annotations

import itertools
import math
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from graphopt.partitioning.atoms import Atoms, Item, bits
from graphopt.partitioning.objective import ALPA, GPIPE, Objective
from graphopt.partitioning.problem import Link

Terms = Mapping[int, float]


@dataclass(frozen=True)
class Solution:
    """What the solver found.

    Attributes:
        value: of the objective; infinite without a solution.
        lower: proven bound.
        bounds: masks of the atoms after each stage; empty without a solution.
        infeasible: whether it proved that there is no solution.
    """

    value: float
    lower: float
    bounds: tuple[int, ...]
    infeasible: bool = False


def solve_milp(
    atoms: Atoms, stages: int, link: Link, objective: Objective, *, seconds: float = math.inf
) -> Solution:
    """Solve by branch and bound, for at most so many seconds."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_matrix

    program = _Program(atoms, stages, link, objective)
    rows, columns, values = program.entries()
    shape = (len(program.lower), program.count)
    constraints = LinearConstraint(
        csr_matrix((values, (rows, columns)), shape=shape), program.lower, program.upper
    )
    options: dict[str, float] = {"mip_rel_gap": 0.0}
    if seconds < math.inf:
        options["time_limit"] = seconds
    with _silent():
        found = milp(
            program.goal(),
            constraints=constraints,
            integrality=np.array(program.integer),
            bounds=Bounds(0.0, np.array(program.most)),
            options=options,
        )
    dual = getattr(found, "mip_dual_bound", None)
    lower = max(0.0, float(dual)) * program.unit if dual is not None and dual > -math.inf else 0.0
    if found.x is None:
        return Solution(math.inf, lower, (), infeasible=found.status == 2)
    return Solution(float(found.fun) * program.unit, lower, program.bounds(found.x))


@contextmanager
def _silent() -> Iterator[None]:
    """HiGHS prints lines of its own past `sys.stdout`."""
    sys.stdout.flush()
    saved, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)
        os.close(nowhere)


class _Program:
    """Variables and constraints, in units of the average atom so that tolerances mean something."""

    def __init__(self, atoms: Atoms, stages: int, link: Link, objective: Objective) -> None:
        self.atoms, self.stages, self.link, self.objective = atoms, stages, link, objective
        total = math.fsum((*atoms.forward, *atoms.backward))
        self.unit = total / len(atoms) if total > 0 else 1.0
        self.integer: list[int] = []
        self.most: list[float] = []
        self.lower: list[float] = []
        self.upper: list[float] = []
        self._entries: list[tuple[int, int, float]] = []
        self._y = [[self.variable(binary=True) for _ in range(stages - 1)] for _ in atoms.members]
        self._order()
        self._cuts = [self._cut(s) for s in range(stages - 1)]
        self._slowest = {name: self.variable(most=math.inf) for name in ("forward", "backward")}
        self._slowest["whole"] = self.variable(most=math.inf)
        self._backward: list[dict[int, float]] = []
        self._loads()
        if objective.memory.limit != math.inf:
            self._memory()

    @property
    def count(self) -> int:
        """Number of variables."""
        return len(self.most)

    def variable(self, *, binary: bool = False, most: float = 1.0) -> int:
        """A new variable from 0 to `most`."""
        self.integer.append(int(binary))
        self.most.append(most)
        return len(self.most) - 1

    def at_least(self, terms: Terms, constant: float) -> None:
        """Require that a sum is at least a constant."""
        row = len(self.lower)
        self._entries += [(row, column, value) for column, value in terms.items()]
        self.lower.append(constant)
        self.upper.append(math.inf)

    def entries(self) -> tuple[list[int], list[int], list[float]]:
        """Rows, columns and values of the constraints."""
        rows = [e[0] for e in self._entries]
        return rows, [e[1] for e in self._entries], [e[2] for e in self._entries]

    def goal(self) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        """Coefficients of what is minimised."""
        goal = np.zeros(self.count)
        kind = self.objective.kind
        if kind == GPIPE:
            goal[[self._slowest["forward"], self._slowest["backward"]]] = 1.0
        elif kind == ALPA:
            goal[self._slowest["whole"]] = self.objective.micro_batches - 1
            goal[self._fixed] = math.fsum((*self.atoms.forward, *self.atoms.backward)) / self.unit
            for forward, backward in self._cuts:
                for column, value in (*forward.items(), *backward.items()):
                    goal[column] += value
            for column, value in self._paid.items():
                goal[column] += value
        else:
            goal[self._slowest["whole"]] = 1.0
        return goal

    def bounds(self, x: np.ndarray[tuple[int], np.dtype[np.float64]]) -> tuple[int, ...]:
        """Masks of the atoms after each stage."""
        masks = [
            sum(1 << v for v, y in enumerate(self._y) if x[y[s]] > 0.5)
            for s in range(self.stages - 1)
        ]
        return (*masks, self.atoms.everything)

    def _in(self, atom: int, stage: int) -> tuple[dict[int, float], float]:
        """Whether an atom is in a stage, as terms and a constant."""
        terms: dict[int, float] = {}
        if stage > 0:
            terms[self._y[atom][stage - 1]] = -1.0
        if stage < self.stages - 1:
            terms[self._y[atom][stage]] = 1.0
            return terms, 0.0
        return terms, 1.0

    def _order(self) -> None:
        for y in self._y:
            for first, second in itertools.pairwise(y):
                self.at_least({second: 1.0, first: -1.0}, 0.0)
        for atom, before in enumerate(self.atoms.before):
            for other in bits(before):
                for s in range(self.stages - 1):
                    self.at_least({self._y[other][s]: 1.0, self._y[atom][s]: -1.0}, 0.0)
        for s in range(self.stages):
            total, constant = self._sum([1.0] * len(self.atoms), s)
            self.at_least(total, 1.0 - constant)

    def _sum(self, weights: list[float], stage: int) -> tuple[dict[int, float], float]:
        terms: dict[int, float] = {}
        constant = 0.0
        for atom, weight in enumerate(weights):
            own, one = self._in(atom, stage)
            constant += weight * one
            for column, sign in own.items():
                terms[column] = terms.get(column, 0.0) + sign * weight
        return terms, constant

    def _cut(self, s: int) -> tuple[dict[int, float], dict[int, float]]:
        """Seconds of the transfers over a cut, as terms."""
        forward: dict[int, float] = {}
        backward: dict[int, float] = {}
        some, some_back = self.variable(), self.variable()
        for flow in self.atoms.flows:
            z = self.variable()
            made = {self._y[flow.maker][s]: -1.0} if flow.maker >= 0 else {}
            constant = 0.0 if flow.maker >= 0 else 1.0
            if flow.final:
                self.at_least({z: 1.0, **made}, constant)
            for reader in bits(flow.readers):
                self.at_least({z: 1.0, **made, self._y[reader][s]: 1.0}, constant)
            for size, terms, any_ in (
                (flow.bytes, forward, some),
                (flow.gradient, backward, some_back),
            ):
                if size:
                    terms[z] = self.link.seconds_per_byte * size / self.unit
                    self.at_least({any_: 1.0, z: -1.0}, 0.0)
        forward[some] = backward[some_back] = self.link.latency / self.unit
        return forward, backward

    def _loads(self) -> None:
        self._fixed = self.variable(most=1.0)
        self.at_least({self._fixed: 1.0}, 1.0)
        self._paid: dict[int, float] = {}
        forward = [f / self.unit for f in self.atoms.forward]
        backward = [b / self.unit for b in self.atoms.backward]
        for s in range(self.stages):
            loads = {"forward": self._sum(forward, s), "backward": self._sum(backward, s)}
            reduced = self._reduced(s)
            self._paid.update(reduced)
            loads["backward"][0].update(reduced)
            both = dict(loads["forward"][0])
            for column, value in loads["backward"][0].items():
                both[column] = both.get(column, 0.0) + value
            loads["whole"] = (both, loads["forward"][1] + loads["backward"][1])
            if not self.objective.overlap:
                for side in (s - 1, s):
                    if 0 <= side < self.stages - 1:
                        self._add_cut(loads, side)
            for name, (terms, constant) in loads.items():
                self._below(name, terms, constant)
        if self.objective.overlap:
            for s in range(self.stages - 1):
                cut: dict[str, tuple[dict[int, float], float]] = {
                    name: ({}, 0.0) for name in ("forward", "backward", "whole")
                }
                self._add_cut(cut, s)
                for name, (terms, _) in cut.items():
                    self._below(name, terms, 0.0)

    def _add_cut(self, loads: dict[str, tuple[dict[int, float], float]], s: int) -> None:
        forward, backward = self._cuts[s]
        for names, terms in ((("forward", "whole"), forward), (("backward", "whole"), backward)):
            for name in names:
                for column, value in terms.items():
                    loads[name][0][column] = loads[name][0].get(column, 0.0) + value

    def _below(self, name: str, terms: Terms, constant: float) -> None:
        negative = {column: -value for column, value in terms.items()}
        self.at_least({self._slowest[name]: 1.0, **negative}, constant)

    def _reduced(self, stage: int) -> dict[int, float]:
        """Reductions that a stage pays for: it has one user of a parameter but not all."""
        result: dict[int, float] = {}
        for item in self.atoms.reduced:
            pays = self.variable()
            result[pays] = item.weight / self.objective.micro_batches / self.unit
            users = list(bits(item.users))
            for one in users:
                for other in users:
                    if one != other:
                        there, constant = self._in(one, stage)
                        out, less = self._in(other, stage)
                        terms = {pays: 1.0}
                        for column, value in there.items():
                            terms[column] = terms.get(column, 0.0) - value
                        for column, value in out.items():
                            terms[column] = terms.get(column, 0.0) + value
                        self.at_least(terms, constant - less)
        return result

    def _memory(self) -> None:
        memory, batches = self.objective.memory, self.objective.micro_batches
        for s in range(self.stages):
            limit = memory.limit_of(s)
            if limit == math.inf:
                continue
            flying = memory.in_flight(self.stages, s, batches)
            copies = memory.copies(self.stages, s)
            terms: dict[int, float] = {}
            weighted = ((self.atoms.saved, flying), (self.atoms.trained, copies))
            for items, factor in (*weighted, (self.atoms.fixed, 1.0)):
                for item in items:
                    terms[self._has(item, s)] = -item.weight * factor / max(limit, 1.0)
            self.at_least(terms, -limit / max(limit, 1.0))

    def _has(self, item: Item, stage: int) -> int:
        has = self.variable()
        for user in bits(item.users):
            terms, constant = self._in(user, stage)
            self.at_least({has: 1.0, **{c: -v for c, v in terms.items()}}, constant)
        return has
