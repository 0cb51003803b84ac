"""Captured models of the corpus, each captured once per test process."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from graphopt.capture import capture
from graphopt.graph import Graph
from graphopt.testing import CORPUS, inputs_for


def captured(name: str, *, training: bool = True) -> tuple[Graph, list[Tensor]]:
    """A copy of a model's graph, with the live inputs of the captured call and random tangents."""
    graph, inputs = _captured(name, training)
    return graph.copy(), list(inputs)


@cache
def _captured(name: str, training: bool) -> tuple[Graph, list[Tensor]]:
    model, args, kwargs = CORPUS[name].make()
    with torch.set_grad_enabled(training):
        found = capture(model.train(training), args, kwargs)
    live = [value.detach() for value in found.inputs]
    return found.graph, [*live, *inputs_for(found.graph)[len(live) :]]
