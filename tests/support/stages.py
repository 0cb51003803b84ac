"""Random stages of a step, and a step run in stages held against the whole."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from graphopt.graph import Graph
from graphopt.partitioning.atoms import atoms_of
from graphopt.partitioning.execute import Executor, Results
from graphopt.partitioning.place import place
from graphopt.partitioning.problem import Problem
from graphopt.partitioning.split import Split, split
from graphopt.plan import Role, Slot
from graphopt.schedules.actions import Schedule
from graphopt.schedules.generate import generate
from graphopt.testing import run_graph


def random_stages(problem: Problem, stages: int, seed: int) -> dict[str, int]:
    """Any stages that a pipeline can run: a random order, cut at random places."""
    draw, atoms = random.Random(seed), atoms_of(problem)
    order: list[int] = []
    done = 0
    while len(order) < len(atoms):
        ready = [
            atom
            for atom, before in enumerate(atoms.before)
            if not done >> atom & 1 and before & ~done == 0
        ]
        order.append(draw.choice(ready))
        done |= 1 << order[-1]
    cuts = draw.sample(range(1, len(atoms)), stages - 1)
    return {
        problem.operators[operator].name: sum(place >= cut for cut in cuts)
        for place, atom in enumerate(order)
        for operator in atoms.members[atom]
    }


def split_graph(graph: Graph, assignment: dict[str, int]) -> Split:
    return split(graph.module, graph.signature, place(graph, assignment))


def by_role(graph: Graph, inputs: Sequence[Any], *roles: Role) -> dict[str, Any]:
    slots = zip(graph.signature.inputs, inputs, strict=True)
    return {slot.name: value for slot, value in slots if slot.role in roles}


def run_stages(graph: Graph, found: Split, schedule: Schedule, *batches: Sequence[Any]) -> Results:
    """Micro-batches through stages, with the parameters of the first one and all their tangents."""
    tangents = [by_role(graph, batch, Role.TANGENT) for batch in batches]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Executor(found).run(
            schedule,
            by_role(graph, batches[0], Role.PARAM, Role.BUFFER, Role.STATE),
            [by_role(graph, batch, Role.INPUT) for batch in batches],
            lambda number, _: tangents[number],
        )


def outputs_of(graph: Graph, inputs: Sequence[Any]) -> dict[Slot, Tensor]:
    return dict(zip(graph.signature.outputs, run_graph(graph, inputs), strict=True))


def assert_same_step(
    graph: Graph, inputs: Sequence[Any], assignment: dict[str, int], kind: str = "1f1b"
) -> Split:
    """Every output, mutation and gradient has the bits that the whole graph gives."""
    found = split_graph(graph, assignment)
    results = run_stages(graph, found, generate(kind, len(found.forward), 1), inputs)
    for slot, expected in outputs_of(graph, inputs).items():
        summed = slot.role is Role.GRAD and slot.name in results.gradients
        actual = results.gradients[slot.name] if summed else results.outputs[0][slot]
        assert actual.dtype is expected.dtype, slot
        assert torch.equal(actual.nan_to_num(), expected.nan_to_num()), slot
    return found
