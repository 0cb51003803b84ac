"""The trial of an order on all ranks: its statistics, and what it runs."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from math import comb
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graphopt.capture import capture
from graphopt.graph import Graph
from graphopt.passes.schedule import trial
from graphopt.passes.schedule.trial import PAIRS, confirmed, device_of, race, step_of
from graphopt.plan import Role
from graphopt.testing import run_graph

CPU = torch.device("cpu")
CHOICE: dict[str, Any] = {"order": ["a"], "split": [], "detail": "reordered", "numbers": {"n": 1}}


class Link:
    """Two ranks with the same gradients: a sum is twice the tensor."""

    def __init__(self) -> None:
        self.sent: list[Tensor] = []
        self.awaited = 0

    def __call__(self, tensor: Tensor) -> Link:
        self.sent.append(tensor.clone())
        tensor.mul_(2)
        return self

    def wait(self) -> bool:
        self.awaited += 1
        return True


def present() -> None:
    """Stands for a step."""


def other() -> None:
    """Stands for a step in another order."""


def raced(monkeypatch: pytest.MonkeyPatch, ratios: Iterator[float]) -> tuple[list[float], str]:
    """What `race` finds where the pairs have these ratios, and which steps it ran."""
    ran, pair = "", 0.0

    def timed(step: trial.Step, *_: object) -> float:
        nonlocal ran, pair
        ran += "p" if step is present else "o"
        if len(ran) > 2 and len(ran) % 2 == 1:
            pair = next(ratios)
        return 1.0 if step is present else pair

    monkeypatch.setattr(trial, "timed", timed)
    return race(present, other, Link(), CPU), ran


def test_orders_without_a_gain_are_taken_once_in_fifty(monkeypatch: pytest.MonkeyPatch) -> None:
    """All outcomes of nine fair coins; the oracle is the binomial distribution."""
    taken = 0
    for coins in product((0.8, 1.25), repeat=PAIRS):
        ratios, _ = raced(monkeypatch, iter(coins))
        taken += bool(confirmed(CHOICE, ratios)["order"])
    assert taken == comb(PAIRS, 0) + comb(PAIRS, 1)
    assert taken / 2**PAIRS < 0.02


def test_pairs_alternate_and_end_when_no_later_one_can_help(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ratios, ran = raced(monkeypatch, iter([0.9] * PAIRS))
    assert ratios == [0.9] * PAIRS
    assert ran == "po" + "poop" * 4 + "po"  # one of each to warm up
    ratios, ran = raced(monkeypatch, iter([0.9, 1.1, 0.9, 1.0]))
    assert ratios == [0.9, 1.1, 0.9, 1.0]
    assert len(ran) == 10


def test_what_is_decided_and_reported() -> None:
    ratios = [0.9, 0.91, 0.92, 0.93, 0.94, 0.95, 0.96, 0.97, 1.5]
    found = confirmed(CHOICE, ratios)
    assert found["order"] == ["a"]
    assert found["numbers"] == {
        "n": 1,
        "pairs": 9,
        "measured_ratio": 0.94,
        "ratio_low": 0.91,
        "ratio_high": 0.97,
    }
    declined = confirmed(CHOICE, [1.2, 1.1])
    assert declined["order"] == []
    assert declined["reason"] == "not-confirmed"
    assert declined["numbers"]["measured_ratio"] == 1.15
    # Eight faster pairs of eight are not nine.
    assert not confirmed(CHOICE, ratios[:8])["order"]


def test_time_is_summed_over_ranks_after_a_common_start() -> None:
    link, ran = Link(), []
    seconds = trial.timed(lambda: ran.append(len(link.sent)), link, CPU)
    assert ran == [1]  # all ranks have met before
    assert link.awaited == len(link.sent) == 2
    assert seconds == 2 * int(link.sent[1]) > 0


# -- the step --------------------------------------------------------------------------------------


def captured() -> Graph:
    torch.manual_seed(0)
    layers = [nn.Linear(6, 5), nn.Dropout(0.5), nn.ReLU(), nn.Linear(5, 4), nn.Linear(4, 3)]
    return capture(nn.Sequential(*layers), (torch.randn(2, 6),), {}).graph


def test_groups_are_sent_as_they_are_ready_and_awaited_at_the_end() -> None:
    graph, link = captured(), Link()
    names = [s.name for s in graph.signature.outputs if s.role is Role.GRAD]
    names = [n for n in names if n in set(graph.signature.names(Role.PARAM))]
    groups = [("4.weight", "4.bias"), ("3.weight",), ("0.bias", "3.bias"), ("0.weight",)]
    assert sorted(n for group in groups for n in group) == sorted(names)
    state = torch.get_rng_state()
    step_of(graph, groups, link)()
    assert torch.equal(torch.get_rng_state(), state)
    assert link.awaited == len(link.sent) == len(groups)
    parameters = dict(
        zip(names, (graph.gradient(n).meta["val"].numel() for n in names), strict=True)
    )
    assert [t.numel() for t in link.sent] == [sum(parameters[n] for n in g) for g in groups]
    assert all(bool(torch.isfinite(t).all()) for t in link.sent)


def test_what_is_sent_are_the_gradients() -> None:
    torch.manual_seed(0)
    graph = capture(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)), (torch.randn(2, 6),), {}).graph
    link = Link()
    groups = [("1.bias", "1.weight"), ("0.weight", "0.bias")]
    step_of(graph, groups, link)()
    results = run_graph(graph, trial.random_inputs(graph))
    slots = [s.name if s.role is Role.GRAD else "" for s in graph.signature.outputs]
    gradients = dict(zip(slots, results, strict=True))
    for group, sent in zip(groups, link.sent, strict=True):
        assert torch.equal(sent, torch.cat([gradients[name].flatten() for name in group]))
    assert device_of(graph) == CPU
