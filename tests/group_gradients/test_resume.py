"""Gradients on their way between two steps are part of the saved state."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import graphopt
from graphopt.errors import StateError
from graphopt.grouping.baselines import per_layer
from graphopt.passes import group_gradients
from tests.support.models import batch, mlp
from tests.support.ranks import on_ranks

pytestmark = pytest.mark.distributed

BEFORE, AFTER = 3, 3


def _started(mode: str, wire: str = "native") -> tuple[Any, torch.optim.Optimizer]:
    model: Any = graphopt.optimize(
        mlp(), passes=f"group_gradients{{stale={mode},wire={wire}}}", backend="eager"
    )
    return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def _train(model: Any, optimizer: torch.optim.Optimizer, rank: int, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        model(batch("mlp", 10 * step + rank)).square().mean().backward()
        optimizer.step()


def _same(left: Any, right: Any) -> bool:
    pairs = zip(left.parameters(), right.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def _other_groups() -> None:
    """From now on plans have one group per layer."""
    planned = group_gradients.plan

    def plan(ready: Any, cost: Any, backward: float, **about: Any) -> Any:
        found = planned(ready, cost, backward, **about)
        return replace(found, groups=tuple(per_layer(ready)))

    group_gradients.plan = plan


def _resumes(rank: int, mode: str, wire: str, file: str) -> None:
    steps = range(BEFORE + AFTER)
    undisturbed, optimizer = _started(mode, wire)
    _train(undisturbed, optimizer, rank, steps)

    saved, optimizer = _started(mode, wire)
    _train(saved, optimizer, rank, steps[:BEFORE])
    state = [saved.state_dict(), optimizer.state_dict(), graphopt.state_dict(saved)]
    torch.save(state, f"{file}.{rank}")
    _train(saved, optimizer, rank, steps[BEFORE:])
    assert _same(saved, undisturbed)

    _other_groups()
    for other_steps in (0, 1):  # whose gradients are on their way when the state is loaded
        resumed, optimizer = _started(mode, wire)
        _train(resumed, optimizer, rank, range(99, 99 + other_steps))
        # Loaded each time: an optimizer goes on in the very tensors that it is given.
        weights, momenta, late = torch.load(f"{file}.{rank}")
        resumed.load_state_dict(weights)
        optimizer.load_state_dict(momenta)
        graphopt.load_state_dict(resumed, late)
        _train(resumed, optimizer, rank, steps[BEFORE:])
        assert _same(resumed, undisturbed)

    without, optimizer = _started(mode, wire)
    weights, momenta, _ = torch.load(f"{file}.{rank}")
    without.load_state_dict(weights)
    optimizer.load_state_dict(momenta)
    _train(without, optimizer, rank, steps[BEFORE:])
    assert not _same(without, undisturbed)


@pytest.mark.parametrize(
    ("mode", "wire"), [("double_buffer", "native"), ("lag", "native"), ("lag", "bf16")]
)
def test_a_resumed_run_has_the_same_bits(mode: str, wire: str, tmp_path: Path) -> None:
    on_ranks(tmp_path, 2, _resumes, mode, wire, str(tmp_path / "state"))


def _of_another_rank(rank: int) -> None:
    model, optimizer = _started("lag")
    _train(model, optimizer, rank, range(2))
    states: list[Any] = [None, None]
    dist.all_gather_object(states, graphopt.state_dict(model))
    assert len(states[0]) == len(list(model.parameters())) + 1
    assert states[0].keys() & states[1].keys() == {"graphopt/format"}

    other, optimizer = _started("lag")
    graphopt.load_state_dict(other, states[1 - rank])
    with pytest.raises(StateError, match=f"gradients of the step before for rank {rank}"):
        _train(other, optimizer, rank, range(1))


def test_the_state_of_another_rank_is_refused(tmp_path: Path) -> None:
    on_ranks(tmp_path, 2, _of_another_rank, timeout=20)


def _nothing_late(rank: int) -> None:
    model, optimizer = _started("none")
    _train(model, optimizer, rank, range(2))
    assert graphopt.state_dict(model) == {}


def test_fresh_results_leave_nothing_to_save(tmp_path: Path) -> None:
    on_ranks(tmp_path, 2, _nothing_late)
