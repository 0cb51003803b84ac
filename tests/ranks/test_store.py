"""No access to the job's store waits for ever, and what ranks compare is told without sizes."""

from __future__ import annotations

import threading
import time
from datetime import timedelta

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from graphopt.capture import capture
from graphopt.errors import RankError
from graphopt.runtime.ranks.agreement import Agreement
from graphopt.runtime.ranks.store import Store, StoreLost
from graphopt.runtime.ranks.watch import IDLE, Wait, Watch


class _Frozen:
    """A store whose holder was stopped."""

    def __init__(self) -> None:
        self.asked = 0

    def check(self, keys: list[str]) -> bool:
        self.asked += 1
        threading.Event().wait()
        return False


def test_a_store_that_does_not_answer() -> None:
    inner = _Frozen()
    store = Store(inner, 0.2)
    start = time.monotonic()
    with pytest.raises(StoreLost, match=r"no answer within 0\.2 s"):
        store.has("key")
    assert time.monotonic() - start < 2
    with pytest.raises(StoreLost):
        store.first(["key"], 60, time.monotonic() + 60)
    assert inner.asked == 1


class _Gone:
    def get(self, key: str) -> bytes:
        raise RuntimeError("Connection was closed\nat some place")

    def set(self, key: str, text: str) -> None:
        raise TypeError("a mistake")


def test_a_store_that_is_gone() -> None:
    with pytest.raises(StoreLost, match=r"^Connection was closed$"):
        Store(_Gone(), 1).get("key")
    with pytest.raises(TypeError, match="a mistake"):
        Store(_Gone(), 1).set("key", "text")


def test_errors_say_whether_a_restart_may_help() -> None:
    lost, other = RankError("lost", hint="look", restart=True), RankError("other")
    assert str(lost).endswith("try: look; a restart from the last checkpoint may help")
    assert str(other).endswith("try: a restart alone does not help")
    assert (lost.restart, other.restart) == (True, False)


class _Calls(nn.Module):
    def __init__(self, power: int) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.power = power

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.layer_norm(self.layer(x), (4,), eps=1e-3) ** self.power
        return F.gelu(y / x.shape[0], approximate="tanh")


def test_functions_are_told_with_their_constants_and_without_sizes() -> None:
    calls = [capture(_Calls(2), (torch.ones(rows, 4),)).functions for rows in (2, 3)]
    assert calls[0] == calls[1]
    assert calls[0].splitlines() == [
        "gelu approximate='tanh'",
        "layer_norm eps=0.001",
        "linear",
        "pow 2",
        "truediv",
    ]
    assert "pow 3" in capture(_Calls(3), (torch.ones(2, 4),)).functions


def test_the_watch_rests_where_nobody_waits() -> None:
    watch = Watch(Agreement(Store(_Gone(), 1), 0, 2, timedelta(seconds=1)))
    watch.wait = Wait(lambda: "a message", [1])
    watch.wait.over = True
    watch.start()
    first = watch.thread
    assert first is not None
    first.join(IDLE * watch.tick + 20)
    assert not first.is_alive()
    assert watch.thread is None  # the next wait starts another one
