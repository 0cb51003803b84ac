"""Three ways in which state and statistics of one method once broke another."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import graphopt
from graphopt.graph import Graph
from graphopt.model.controller import controller_of
from graphopt.passbase import EXACT, Applied, Numerics, Outcome, Pass, PassContext
from graphopt.plan import Phase, Role, Slot
from graphopt.rewrite import emit
from tests.support.ranks import on_ranks

aten = torch.ops.aten


@dataclass(frozen=True)
class Remembers(Pass):
    """Keeps a tensor under a name that other methods use, too."""

    name: ClassVar[str] = "remembers"
    levels: ClassVar[frozenset[str]] = frozenset({"joint"})

    def apply(self, graph: Graph, ctx: PassContext) -> Outcome:
        ctx.state["relu/interval"] = torch.ones(1)
        return Outcome()


@dataclass(frozen=True)
class MeansFirst(Pass):
    """Returns the mean of each activation before everything else that the forward returns."""

    name: ClassVar[str] = "means_first"
    numerics: ClassVar[Numerics] = EXACT
    levels: ClassVar[frozenset[str]] = frozenset({"joint"})
    changes_signature: ClassVar[bool] = True

    def apply(self, graph: Graph, ctx: PassContext) -> Outcome:
        means: dict[Slot, Any] = {}
        for node in [n for n in graph.operators if n.target is aten.relu.default]:
            with graph.fx.inserting_after(node):
                mean = emit(graph, aten.mean.default, node, like=node)
            means[Slot(Role.AUX, f"{self.name}/{node.name}", Phase.FORWARD)] = mean
        outputs = dict(zip(graph.signature.outputs, graph.outputs, strict=True))
        graph.set_outputs({**means, **outputs})
        graph.changed()
        return Outcome(tuple(Applied(slot.name, "averaged") for slot in means))


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2)
    )


def test_a_state_key_that_another_method_uses_does_not_break_the_report() -> None:
    model = graphopt.optimize(_net(), passes=[Remembers()], backend="eager")
    model(torch.randn(8, 4)).sum().backward()
    assert "remembers" in model.explain()
    assert list(graphopt.state_dict(model)) == [
        "remembers/relu/interval",
        "graphopt/format",
    ]


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_forward_statistics_before_mutations_leave_each_buffer_its_own(backend: str) -> None:
    plain = _net()
    # Without verification, which would tell, but only of the buffers that it looks at.
    model = graphopt.optimize(
        copy.deepcopy(plain), passes=[MeansFirst()], backend=backend, verify="structure"
    )
    for step in range(2):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step)) + 3
        for m in (model, plain):
            m.zero_grad()
            m(x).square().sum().backward()
    for (name, one), other in zip(model.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(one, other, msg=name)
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("within", [False, True])
def test_a_trial_leaves_the_accumulation_as_it_was(within: bool) -> None:
    model = graphopt.optimize(_net(), passes="kfac", backend="eager")
    controller = controller_of(model)
    assert controller is not None
    session = controller.session
    if within:
        with model.no_sync():
            model(torch.randn(8, 4)).sum().backward()
    assert session.pending is within
    y = model(torch.randn(6, 4))  # of another size: verified now
    assert session.pending is within
    y.sum().backward()
    assert not session.pending


def _keeps_own_gradients(rank: int) -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    graphopt.optimize(model, backend="eager", verify="full")
    batches = [torch.full((4, 3), float(r)) for r in range(2)]
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 10.0 + rank)
    # The first call is verified, in a trial that does not reduce.
    model(batches[rank]).sum().backward()
    mean = torch.stack([x.sum(0) for x in batches]).mean(0)
    wanted: Tensor = 10.0 + rank + mean.expand(2, 3)
    torch.testing.assert_close(model.weight.grad, wanted)


def test_after_a_trial_a_step_takes_no_gradients_that_it_did_not_accumulate(
    tmp_path: Path,
) -> None:
    """They would be reduced, and each rank would have the mean of what was there before."""
    on_ranks(tmp_path, 2, _keeps_own_gradients)
