"""Micro-batches of sizes that vary go through stages that were captured a few times."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graphopt
from graphopt.capture import capture
from graphopt.capture.sizes import Dimensions
from graphopt.model.controller import controller_of
from graphopt.passes.partition import Partition
from graphopt.pipeline import Pipeline
from graphopt.plan import Role
from tests.support.pipelines import accumulated, differing
from tests.support.ranks import on_ranks


class Tagger(nn.Module):
    """Attends over a sequence, twice; views of it have sizes of both dimensions."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(20, 16)
        self.first, self.second = nn.Linear(16, 48), nn.Linear(16, 48)
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in (self.first, self.second):
            q, k, v = layer(self.norm(x)).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
            x = x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        scores: Tensor = self.head(x)
        return scores


def _loss(scores: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(scores.flatten(0, 1), target.flatten())


def _batch(examples: int, length: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * examples + length)
    ids = torch.randint(0, 20, (examples, length), generator=generator)
    return ids, ids % 5


# Micro-batches of one step differ in their numbers of examples, and batches in their lengths.
BATCHES = ((8, 6), (8, 9), (7, 9), (10, 4), (5, 13), (9, 7))


def _train(rank: int) -> None:
    cases: tuple[tuple[str, Any, int], ...] = (
        ("1f1b", None, 3),
        ("zero_bubble", {"ids": {0: "batch", 1: "length"}}, 1),
    )
    for schedule, dynamic, captures in cases:
        plain, model = Tagger(), Tagger()
        theirs, ours = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (plain, model))
        graphopt.optimize(
            model,
            passes=f"partition{{schedule={schedule},microbatches=2}}",
            mesh="pp=2",
            backend="eager",
            loss=_loss,
            optimizer=ours,
            dynamic=dynamic,
        )
        for examples, length in BATCHES:
            batch = _batch(examples, length)
            loss = model.step(*batch)
            assert torch.equal(loss, accumulated(plain, _loss, theirs, batch, 2))
        controller = controller_of(model)
        assert controller is not None
        assert controller.made == captures
        assert not controller.seen.notes
        assert not differing(model, plain), (schedule, differing(model, plain))


@pytest.mark.distributed
def test_batches_of_many_sizes_take_three_captures(tmp_path: Path) -> None:
    on_ranks(tmp_path, 2, _train)


def test_sizes_are_at_hand_in_every_stage() -> None:
    ids = _batch(6, 9)[0]
    varying = Dimensions({id(ids): {0: "ids.0", 1: "ids.1"}})
    graph = capture(Tagger(), (ids,), {}, dimensions=varying).graph
    computed = [n for n in graph.operators if n.name.startswith("size_")]
    assert computed
    (step,) = Pipeline((Partition(stages=3),)).run(graph)
    part = step.outcome.part
    placed = {n for s in part.stages for n in (*s.forward_nodes, *s.backward_nodes)}
    assert not placed & {n.name for n in computed}
    sizes = {
        n.name
        for n, s in zip(graph.inputs, graph.signature.inputs, strict=True)
        if s.role is Role.SIZE
    }
    crossing = {c.name for c in part.crossings}
    assert crossing
    assert not crossing & ({n.name for n in computed} | sizes)
