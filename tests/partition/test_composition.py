"""Stages of steps that other passes have rewritten: everything they return has the bits it had."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from graphopt.capture import capture
from graphopt.graph import Graph
from graphopt.partitioning.atoms import atoms_of
from graphopt.partitioning.from_graph import from_graph
from graphopt.passbase import PassContext
from graphopt.pipeline import Pipeline
from graphopt.plan import Role
from graphopt.testing import inputs_for
from tests.support.stages import assert_same_step, random_stages


def _graph() -> Graph:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * 16, 10),
    )
    return capture(model, (torch.randn(2, 3, 4, 4),)).graph


@pytest.mark.parametrize(
    "spec",
    [
        "cleanup,precision{cost=roofline,policy=tf}",
        "precision{format=fp16,cost=roofline,policy=tf}",
        "precision{format=flex16}",
        "kfac",
        "flexpoint",
        "kfac,schedule",
    ],
)
def test_rewritten_steps(spec: str) -> None:
    graph, context = _graph(), PassContext()
    Pipeline.parse(spec).run(graph, context)
    inputs = [
        context.states[slot.name.split("/")[0]][slot.name.partition("/")[2]]
        if slot.role is Role.STATE
        else value
        for slot, value in zip(graph.signature.inputs, inputs_for(graph), strict=True)
    ]
    problem = from_graph(graph)
    assert len(atoms_of(problem)) >= 3
    for stages, seed in ((2, 0), (3, 1), (3, 2)):
        assert_same_step(graph, inputs, random_stages(problem, stages, seed))


def test_behind_other_passes_it_plans_what_they_left() -> None:
    spec = "cleanup,kfac,precision{cost=roofline,policy=tf},schedule,partition"
    steps = Pipeline.parse(spec).run(_graph(), PassContext(mesh={"pp": 2}))
    assert steps[-1].outcome.applied[0].what == "cut into 2 stages"
