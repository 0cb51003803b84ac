"""What a step of any workload owes: one graph, with PyTorch's gradients to the last bit."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

import graphopt
from graphopt.examples.common import Case
from graphopt.model.controller import controller_of
from graphopt.model.surface import report


def one_exact_graph(case: Case) -> dict[str, Tensor]:
    """Hold the step against PyTorch eager; the gradients of all parameters that it trains."""
    plain = copy.deepcopy(case.model)
    model = graphopt.optimize(case.model, passes=case.passes, backend="eager")
    losses = [case.loss(own(*case.inputs)) for own in (plain, model)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    found = {}
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        if theirs.requires_grad:
            assert ours.grad is not None, name
            assert theirs.grad is not None, name
            assert torch.equal(ours.grad, theirs.grad), name
            found[name] = ours.grad
    said = report(model)
    (only,) = said.specialisations
    assert (only.level, only.verification.result) == ("joint", "bit-equal")
    assert not said.plain
    assert controller_of(model).made == 1
    assert found
    return found
