"""What the ranks of ``job_faults`` train, and how one of them is struck."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

import graphopt

TIMEOUT = 8.0  # of the process group, in seconds
STEPS = 8
MID = 4  # the step of a fault in mid-training
SCHEDULES = ("gpipe", "1f1b", "interleaved", "zero_bubble", "no_flush")
Strike = Callable[[], None]


@dataclass(frozen=True)
class Attack:
    """One fault.

    Attributes:
        fault: what happens.
        place: where.
        world: number of ranks.
        victim: the rank that it happens to.
        job: how the ranks train: ``"dp"``, a schedule of a pipeline, ``"dp x pp"``, or passes.
    """

    fault: str
    place: str
    world: int
    victim: int
    job: str = "dp"

    def __str__(self) -> str:
        return f"{self.job}/{self.fault}/{self.place}/{self.world}/{self.victim}"


def train(attack: Attack, victim: bool, folder: str) -> None:
    """Train, and suffer the fault if this rank is its victim."""

    def strike() -> None:
        Path(folder, "fault").write_text(str(time.time()))
        if attack.fault in ("kill", "stop"):
            os.kill(os.getpid(), signal.SIGKILL if attack.fault == "kill" else signal.SIGSTOP)

    torch.manual_seed(0)
    if attack.job in ("dp", "flexpoint"):
        _data_parallel(attack, victim, strike)
    else:
        _pipeline(attack, victim, strike)


def _pipeline(attack: Attack, victim: bool, strike: Strike) -> None:
    layers = [part for _ in range(6) for part in (nn.Linear(8, 8), nn.Tanh())]
    model: Any = nn.Sequential(*layers)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    both = attack.job == "dp x pp"
    schedule = "1f1b" if both else attack.job
    count = 12 if victim and attack.fault == "micro-batches differ" else 6
    forwards, step = 0, 0

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        # Only the last stage has more than the form of an output.
        if victim and step == MID and attack.fault == "an error in the loss" and output.any():
            strike()
            raise ArithmeticError("the loss has overflowed")
        return (output - target).square().mean()

    model = graphopt.optimize(
        model,
        passes=f"partition{{schedule={schedule},microbatches={count}}}"
        + (",group_gradients{link=10gbe}" if both else ""),
        mesh="dp=2,pp=2" if both else "pp=3",
        backend="eager",
        verify="off",
        loss=loss,
        optimizer=optimizer,
    )
    from graphopt.runtime.partition.work import Work

    forward = Work.forward

    def struck(self: Any, stage: int, task: Any, **kwargs: Any) -> None:
        nonlocal forwards
        if victim and step == MID and attack.fault in ("kill", "stop"):
            forwards += 1
            if forwards == 3:  # other micro-batches are under way
                strike()
        forward(self, stage, task, **kwargs)

    if victim and attack.place == "agreement":
        strike()
    with mock.patch.object(Work, "forward", struck):
        for step in range(1, STEPS + 1):
            # Replicas have other batches; ranks of one pipeline the same.
            torch.manual_seed(step + (100 * (int(os.environ["RANK"]) // 2) if both else 0))
            x = torch.randn(12, 8)
            if victim and step == MID and attack.fault == "slip":
                strike()
                continue
            model.step(x, x)


def _data_parallel(attack: Attack, victim: bool, strike: Strike) -> None:
    strikes = victim and attack.fault in ("kill", "stop")
    if attack.place == "before optimize" and victim:
        strike()
    width = 24 if victim and attack.fault == "parameters differ" else 16
    other = victim and attack.fault == "ReLU against Tanh"
    model: Any = nn.Sequential(
        nn.Linear(8, width), nn.BatchNorm1d(width), nn.Tanh() if other else nn.ReLU(),
        nn.Linear(width, 4),
    )  # fmt: skip
    passes = "auto"
    if attack.fault == "passes that send nothing" and victim:
        passes = "cleanup"
    if attack.fault == "an option differs":
        passes = f"group_gradients{{wire={'bf16' if victim else 'native'}}}"
    if attack.job == "flexpoint":
        passes = "flexpoint,group_gradients{link=10gbe}"
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)  # type: ignore[attr-defined]
    if attack.place == "agreement" and victim and not strikes:
        strike()
    with _injected(attack.place, strike) if strikes else contextlib.nullcontext():
        # Verifying flex tensors takes longer than the timeout where attacks run side by side.
        verify: Any = "off" if attack.job == "flexpoint" else "eager"
        model = graphopt.optimize(model, passes=passes, backend="eager", verify=verify)
        if attack.fault == "loss scale differs":
            graphopt.use_scaler(model, scaler)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for step in range(1, STEPS + 1):
            now = victim and step == (1 if attack.place == "first step" else MID)
            x = torch.randn(6, 8)
            if now and attack.fault in ("nan", "slip"):
                strike()
                x[0, 0] = float("nan") if attack.fault == "nan" else x[0, 0]
            if now and attack.fault == "loss scale differs":
                strike()
                scaler.update(512.0)
            if now and attack.fault == "exponents differ":
                strike()
                state = graphopt.state_dict(model)
                state = {k: v + 1 if "/exponents/" in k else v for k, v in state.items()}
                graphopt.load_state_dict(model, state)
            skips = model.no_sync() if now and attack.fault == "slip" else None
            optimizer.zero_grad()
            with skips or contextlib.nullcontext():
                loss = model(x).square().mean()
                (scaler.scale(loss) if attack.fault == "loss scale differs" else loss).backward()
            optimizer.step()
            if passes == "cleanup":
                time.sleep(TIMEOUT / 4)  # its steps must not be over before others notice


@contextlib.contextmanager
def _injected(place: str, strike: Callable[[], None]) -> Iterator[None]:
    """Within, the process is struck at a place of graphopt's own code."""
    from graphopt.runtime.group_gradients.messages import Messages
    from graphopt.runtime.ranks import link
    from graphopt.runtime.ranks.agreement import Agreement

    calls = 0
    at = {
        "link measurement": (link, "_timed"),
        "agreement": (Agreement, "agree"),
        "first step": (Messages, "start"),
        "mid-step": (Messages, "start"),
    }
    if place not in at:
        yield
        return
    owner, name = at[place]
    real = getattr(owner, name)

    def struck(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        hit = {
            "link measurement": calls == 9,
            "agreement": args[1] == "gradients",
            "first step": calls == 1,
            "mid-step": getattr(args[0], "step", 0) == MID,
        }
        if hit[place]:
            strike()
        return real(*args, **kwargs)

    with mock.patch.object(owner, name, struck):
        yield
