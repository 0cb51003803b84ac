"""Gradients that only some ranks have: the mean over all; those that no rank has stay absent.

The oracle is `DistributedDataParallel` with ``find_unused_parameters=True``. It wants heads that
the loss does not use left out of the forward, which graphopt does not need.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import graphopt
from graphopt.plan import Phase, Plan, Role, Signature, Slot
from graphopt.runtime.ranks.presence import Presence
from tests.support.models import batch
from tests.support.ranks import on_ranks

HEADS = ("a", "b", "c")

# Heads in the loss of each rank, for each micro-batch of a step; only the last one reduces.
STEPS = [
    [("ab", "a")],  # b on rank 0 only
    [("a", "a")],  # b and c nowhere
    [("abc", "c")],
    [("b", "a"), ("a", "a")],  # b only while accumulating
    [("a", "ac"), ("c", "c")],  # a only while accumulating
    [("c", "b")],  # nothing in common
]


class Heads(nn.Module):
    """A trunk and three heads."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Linear(8, 16)
        self.heads = nn.ModuleDict({name: nn.Linear(16, 4) for name in HEADS})

    def forward(self, x: Tensor, wanted: str = "abc") -> tuple[Tensor, ...]:
        hidden = torch.tanh(self.trunk(x))
        return tuple(self.heads[name](hidden) for name in wanted)


def _loss(outputs: tuple[Tensor, ...]) -> Tensor:
    return torch.stack([o.square().mean() for o in outputs]).sum()


def _like_ddp(rank: int, wire: str) -> None:
    plain = Heads()
    wrapped = DistributedDataParallel(plain, find_unused_parameters=True)
    model: Any = graphopt.optimize(
        copy.deepcopy(plain), passes=f"group_gradients{{wire={wire}}}", backend="eager"
    )
    for step, micro_batches in enumerate(STEPS):
        plain.zero_grad()
        model.zero_grad()
        for micro, wanted in enumerate(micro_batches):
            last = micro == len(micro_batches) - 1
            x = batch("mlp", 100 * step + 10 * micro + rank)
            mine = wanted[rank]
            with nullcontext() if last else wrapped.no_sync():
                _loss(wrapped(x, mine)).backward()
            with nullcontext() if last else model.no_sync():
                outputs = dict(zip(HEADS, model(x), strict=True))
                _loss(tuple(outputs[name] for name in mine)).backward()
        used = {name for wanted in micro_batches for heads in wanted for name in heads}
        for (name, actual), expected in zip(
            model.named_parameters(), plain.parameters(), strict=True
        ):
            somewhere = name.startswith("trunk") or name.split(".")[1] in used
            assert (actual.grad is not None) == somewhere, (step, name)
            if somewhere:
                torch.testing.assert_close(actual.grad, expected.grad, rtol=1e-5, atol=1e-6)
            else:
                assert expected.grad is None


@pytest.mark.distributed
@pytest.mark.parametrize("wire", ["native", "int32"])
def test_like_ddp_with_unused_parameters(wire: str, tmp_path: Path) -> None:
    on_ranks(tmp_path, 2, _like_ddp, wire, timeout=20)


def _zeros_before(rank: int) -> None:
    """What stood in ``.grad`` before an accumulating step is neither lost nor made absent."""
    model: Any = graphopt.optimize(Heads(), backend="eager")
    model.zero_grad(set_to_none=False)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, float(rank))
    with model.no_sync():
        model(batch("mlp", rank))[0].sum().backward()
    model(batch("mlp", rank))[0].sum().backward()
    assert torch.equal(model.heads["c"].weight.grad, torch.full((4, 16), 0.5))


@pytest.mark.distributed
def test_gradients_from_before(tmp_path: Path) -> None:
    on_ranks(tmp_path, 2, _zeros_before, timeout=20)


def _late(rank: int) -> None:
    """A result of the step before counts whatever this step's loss uses."""
    model: Any = graphopt.optimize(
        Heads(), passes="group_gradients{stale=double_buffer}", backend="eager"
    )
    x = batch("mlp", rank)
    model(x)[1].square().mean().backward()
    model.zero_grad()
    model(x)[0].square().mean().backward()
    expected = []
    for other in range(2):
        plain = Heads()
        plain(batch("mlp", other))[1].square().mean().backward()
        expected.append(plain.heads["b"].weight.grad)
    torch.testing.assert_close(model.heads["b"].weight.grad, sum(expected) / 2)
    assert not model.heads["a"].weight.grad.any()


@pytest.mark.distributed
def test_results_of_the_step_before_are_never_absent(tmp_path: Path) -> None:
    on_ranks(tmp_path, 2, _late, timeout=20)


# -- when ranks have to ask ------------------------------------------------------------------------


def _presence(sources: tuple[tuple[int, ...], ...]) -> Presence:
    grads = tuple(Slot(Role.GRAD, f"p{i}", Phase.BACKWARD) for i in range(len(sources)))
    inputs = tuple(Slot(Role.PARAM, g.name) for g in grads)
    tangents = tuple(Slot(Role.TANGENT, str(i)) for i in range(2))
    plan = Plan(
        spec="",
        signature=Signature((*inputs, *tangents), grads),
        gradient_sources=sources,
    )
    return Presence(plan, ("p0", "p1"))


def test_ranks_ask_only_where_they_can_differ() -> None:
    assert not _presence(((0, 1), (0, 1))).asks
    assert not _presence(((1,), (1,))).asks  # no gradient needs the first output
    assert not _presence(((0, 1), ())).asks  # the second one is absent for everybody
    assert not _presence(((0, 1), (0, 1), (0,))).asks  # the third one is not reduced
    assert _presence(((0, 1), (0,))).asks


def test_without_a_question_only_gradients_that_nobody_reduces_are_absent() -> None:
    presence = _presence(((0, 1), (0, 1), (0,)))
    assert presence.absent({"p1", "p2"}, None) == {"p2"}
    assert _presence(((0, 1), ())).absent({"p0", "p1"}, None) == {"p1"}


def test_ranks_that_list_gradients_in_other_orders_ask_in_one() -> None:
    grads = [Slot(Role.GRAD, name, Phase.BACKWARD) for name in ("p0", "p1")]
    inputs = [Slot(Role.PARAM, grad.name) for grad in grads]
    tangents = [Slot(Role.TANGENT, str(i)) for i in range(2)]
    found = [
        Presence(
            Plan(
                spec="",
                signature=Signature((*inputs[::step], *tangents), tuple(grads[::step])),
                gradient_sources=((0,), (1,))[::step],
            ),
            ("p0", "p1"),
        )
        for step in (1, -1)
    ]
    assert found[0].names == found[1].names
