"""Jobs end: whatever happens to one rank is an error on all of them, in time, and names it."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import graphopt
from graphopt.errors import RankError
from tests.support.models import batch, mlp
from tests.support.ranks import in_processes, on_ranks

pytestmark = pytest.mark.distributed


# -- ranks that slip -------------------------------------------------------------------------------


def _slips(rank: int, passes: str, last: int) -> None:
    model: Any = graphopt.optimize(mlp(), passes=passes, backend="eager", verify="off")
    done = []

    def train() -> None:
        for step in range(1, 9):
            done.append(step)
            with model.no_sync() if rank == 1 and step == 3 else contextlib.nullcontext():
                model(batch("mlp", rank)).sum().backward()

    with pytest.raises(RankError) as raised:
        train()
    assert done[-1] == last + rank  # rank 1 is one pass ahead
    where = f"rank 0 is in backward pass {last}, rank 1 is in backward pass {last + 1}"
    assert where in raised.value.message
    assert not raised.value.restart


@pytest.mark.parametrize(
    ("options", "last"),
    [
        ("", 3),
        ("wire=bf16", 3),
        ("wire=int32", 3),
        ("stale=double_buffer", 4),  # what was sent in a pass arrives in the next one
        ("stale=lag", 3),
    ],
)
def test_a_rank_that_slips_is_found_at_once(options: str, last: int, tmp_path: Path) -> None:
    options = ",".join(filter(None, ["link=10gbe", options]))
    on_ranks(tmp_path, 2, _slips, f"group_gradients{{{options}}}", last, timeout=20)


def _scales(rank: int) -> None:
    model: Any = graphopt.optimize(mlp(), backend="eager", verify="off")
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)  # type: ignore[attr-defined]
    graphopt.use_scaler(model, scaler)
    for _ in range(2):
        scaler.scale(model(batch("mlp", rank)).sum()).backward()
    scaler.update(1024.0 / (1 + rank))
    loss = scaler.scale(model(batch("mlp", rank)).sum())
    with pytest.raises(RankError, match="rank 0 has 1024, rank 1 has 512") as raised:
        loss.backward()
    assert "losses with different scales were added up" in str(raised.value)
    assert not raised.value.restart


def test_loss_scales_that_differ(tmp_path: Path) -> None:
    on_ranks(tmp_path, 2, _scales, timeout=20)


def _precisions(rank: int) -> None:
    """Without reduced gradients ranks ask each other whether to leave a step out."""
    spec = "precision{format=fp16,cost=roofline,policy=tf}"
    for passes in (f"{spec},group_gradients{{link=10gbe}}", spec):
        model: Any = graphopt.optimize(mlp(), passes=passes, backend="eager", verify="off")
        model(batch("mlp", rank)).sum().backward()
        if rank:
            state = graphopt.state_dict(model)
            state["precision/scale"] /= 2
            graphopt.load_state_dict(model, state)
        loss = model(batch("mlp", rank)).sum()
        with pytest.raises(RankError, match=r"scales .*: rank 0 has \d+, rank 1 has \d+"):
            loss.backward()


def test_scales_of_precision_that_differ(tmp_path: Path) -> None:
    on_ranks(tmp_path, 2, _precisions, timeout=20)


def _one_weight(rank: int) -> None:
    """A message that is one gradient as it lies; nothing else to put the number in."""
    model: Any = graphopt.optimize(nn.Linear(4, 1, bias=False), backend="eager")
    for step in (1, 2):
        model.zero_grad()
        model(torch.full((1, 4), float(step + rank))).sum().backward()
        torch.testing.assert_close(model.weight.grad, torch.full((1, 4), step + 0.5))
    if rank:
        with model.no_sync():
            model(torch.ones(1, 4)).sum().backward()
    loss = model(torch.ones(1, 4)).sum()
    with pytest.raises(RankError, match=r"rank 0 is in backward pass 3, rank 1 is .* pass 4"):
        loss.backward()


def test_one_gradient_is_stamped_too(tmp_path: Path) -> None:
    on_ranks(tmp_path, 2, _one_weight, timeout=20)


# -- ranks that differ -----------------------------------------------------------------------------


def _computes(rank: int, found: str) -> None:
    other = {"tanh": nn.Tanh(), "slope": nn.LeakyReLU(0.2)}[found]
    own = {"tanh": nn.ReLU(), "slope": nn.LeakyReLU(0.1)}[found]
    parts = [nn.Linear(8, 8), other if rank else own, nn.Dropout(0.5)]
    model: Any = graphopt.optimize(nn.Sequential(*parts), backend="eager")
    expected = {
        "tanh": r"rank 0 has 'relu.*where rank 1 has 'tanh",
        "slope": r"rank 0 has 'leaky_relu 0.1.*where rank 1 has 'leaky_relu 0.2",
    }[found]
    with pytest.raises(RankError, match=f"functions that the models call differ: {expected}"):
        model(batch("mlp", rank))


@pytest.mark.parametrize("found", ["tanh", "slope"])
def test_ranks_that_compute_different_things(found: str, tmp_path: Path) -> None:
    on_ranks(tmp_path, 2, _computes, found, timeout=20)


class _Sizes(nn.Module):
    """Its functions take numbers that are made of sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.shape[0]
        y = self.layer(x).view(rows, 2, 2) * (1.0 / rows) + torch.full((rows, 2, 2), 0.5 / rows)
        return y.clamp(max=float(rows)).reshape(rows * 4).sum() / rows


def _other_sizes(rank: int) -> None:
    model: Any = graphopt.optimize(_Sizes(), backend="eager")
    for rows in (3 + 2 * rank, 4, 6 + rank):
        model(torch.ones(rows, 8)).backward()


def test_sizes_may_differ(tmp_path: Path) -> None:
    on_ranks(tmp_path, 2, _other_sizes, timeout=20)


def _silent(rank: int) -> None:
    passes = "cleanup" if rank else "auto"
    expected = (
        "the passes 'cleanup' of rank 1 send nothing, and other ranks wait for it"
        if rank
        else "rank 1 did not come to agree on models within 3 s; the passes 'cleanup' of rank 1"
    )

    def train() -> None:
        model: Any = graphopt.optimize(mlp(), passes=passes, backend="eager")
        for _ in range(200):
            model(batch("mlp", rank)).sum().backward()
            time.sleep(0.05)

    with pytest.raises(RankError, match=expected):
        train()


def test_a_rank_with_passes_that_send_nothing(tmp_path: Path) -> None:
    on_ranks(tmp_path, 2, _silent, timeout=3)


# -- ranks that are lost ---------------------------------------------------------------------------


def _dies(rank: int, folder: str) -> None:
    model: Any = graphopt.optimize(mlp(), backend="eager", verify="off")
    model(batch("mlp", rank)).sum().backward()
    if rank == 2:
        os._exit(0)  # without a word to the others
    start = time.monotonic()
    with pytest.raises(RankError, match=r"step 2: rank 2 did not answer") as raised:
        model(batch("mlp", rank)).sum().backward()
    assert raised.value.restart
    assert "a restart from the last checkpoint may help" in str(raised.value)
    assert time.monotonic() - start < 8 + 5
    Path(folder, f"raised{rank}").touch()


def test_survivors_blame_only_the_dead(tmp_path: Path) -> None:
    on_ranks(tmp_path, 4, _dies, str(tmp_path), timeout=8)
    assert len(list(tmp_path.glob("raised*"))) == 3


def _over_tcp(rank: int, port: int, folder: str) -> None:
    store = dist.TCPStore("127.0.0.1", port, 2, rank == 0, timeout=timedelta(seconds=60))
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=5)
    )
    model: Any = graphopt.optimize(mlp(), backend="eager", verify="off")
    model(batch("mlp", rank)).sum().backward()
    if rank == 0:  # its process holds the store, too
        Path(folder, "pid").write_text(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGSTOP)
        os._exit(0)
    start = time.monotonic()
    try:
        with pytest.raises(RankError, match=r"rank 0 of the job, which holds .*, did not answer"):
            model(batch("mlp", rank)).sum().backward()
        assert time.monotonic() - start < 5 + 5
    finally:
        os.kill(int(Path(folder, "pid").read_text()), signal.SIGCONT)


def test_a_frozen_rank_0(tmp_path: Path) -> None:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    in_processes(2, _over_tcp, port, str(tmp_path))


def _late(rank: int) -> None:
    model: Any = graphopt.optimize(mlp(), backend="eager", verify="off")
    model(batch("mlp", rank)).sum().backward()
    if rank == 1:
        time.sleep(5)
        model(batch("mlp", rank)).sum().backward()
        return
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("graphopt").addHandler(handler)
    model(batch("mlp", rank)).sum().backward()  # no error: the other one comes
    (warning,) = (text for text in said if "has waited" in text)
    assert "for rank 1, which has not sent; an error follows in" in warning
    assert "the gradients of group 0" in warning
    assert "step 2" in warning


def test_a_stall_is_told_before_it_is_an_error(tmp_path: Path) -> None:
    on_ranks(tmp_path, 2, _late, timeout=12)


def test_a_step_starts_no_thread_but_the_watch(tmp_path: Path) -> None:
    on_ranks(tmp_path, 2, _threads)


def _threads(rank: int) -> None:
    model: Any = graphopt.optimize(mlp(), backend="eager", verify="off")
    model(batch("mlp", rank)).sum().backward()
    before = {thread.ident for thread in threading.enumerate()}
    for _ in range(20):
        model(batch("mlp", rank)).sum().backward()
    assert {thread.ident for thread in threading.enumerate()} <= before
