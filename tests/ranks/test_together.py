"""What all ranks run at the same time: once, with rank 0's result, and a word where it fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from graphopt.errors import RankError
from graphopt.passbase import Send
from graphopt.runtime.ranks.ranks import Ranks
from tests.support.ranks import on_ranks


class Alone:
    """A group and an agreement of one rank."""

    def __init__(self, error: str = "") -> None:
        self.error = error
        self.agreed: list[str] = []

    def agree(self, topic: str, mine: str, decide: Callable[[], str], hint: str) -> str:
        self.agreed.append(topic)
        return decide()

    def allreduce(self, tensors: list[Tensor]) -> None:
        raise RuntimeError(self.error)


@contextmanager
def _waiting(what: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise RankError(f"{what}: {str(error).splitlines()[0]}", hint="look") from error


def alone(error: str = "") -> tuple[Ranks, Alone]:
    found = Alone(error)
    group = cast("Any", SimpleNamespace(inner=found, agreement=found, waiting=_waiting))
    return Ranks(group, torch.device("cpu")), found


def test_it_runs_once() -> None:
    ranks, found = alone()
    assert ranks.together("order", "a", lambda send: "1") == "1"
    assert ranks.together("order", "a", lambda send: pytest.fail("a second time")) == "1"
    assert ranks.together("order", "b", lambda send: "2") == "2"
    assert found.agreed == ["order", "order"]


def test_a_failed_message_is_named_and_leaves_no_decision() -> None:
    ranks, found = alone("Connection closed by peer\nand a stack")
    with pytest.raises(RankError) as info:
        ranks.together("order", "a", lambda send: str(send(torch.ones(1))))
    assert info.value.message == "the order cannot be tried out: Connection closed by peer"
    assert found.agreed == []


def _of_rank_0(rank: int) -> None:
    ranks = Ranks.of(nn.Linear(1, 1), cast("Any", dist.group.WORLD))

    def run(send: Send) -> str:
        tensor = torch.tensor([rank + 1])
        send(tensor).wait()
        return f"{rank}: {int(tensor)}"

    assert ranks.together("order", "a", run) == "0: 3"


@pytest.mark.distributed
def test_all_ranks_take_part_and_rank_0_tells(tmp_path: Path) -> None:
    on_ranks(tmp_path, 2, _of_rank_0, timeout=60)
