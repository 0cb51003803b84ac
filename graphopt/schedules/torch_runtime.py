"""Run a schedule on torch's pipeline runtime: the only file that knows that private interface.

Checked with torch 2.13. The runtime lowers a schedule of computations by itself: it adds sends,
receives, and an action behind the last backward of each stage that scales and reduces gradients. A
schedule that has sends and receives gets only the last one, here.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

from torch import Tensor
from torch.distributed.pipelining import schedules
from torch.distributed.pipelining.stage import _PipelineStageBase

from graphopt.errors import ArgumentError
from graphopt.schedules.actions import Action, Kind, Schedule
from graphopt.schedules.check import check
from graphopt.schedules.table import to_csv

Runtime = schedules._PipelineScheduleRuntime


def torch_runtime(
    schedule: Schedule,
    stages: Sequence[_PipelineStageBase],
    loss: Callable[..., Tensor] | None = None,
) -> Runtime:
    """A runtime whose ``step`` follows a schedule on this rank.

    Args:
        schedule: a synchronous one, with or without sends and receives.
        stages: those of this rank.
        loss: of one micro-batch, from its output and its target.

    Raises:
        ArgumentError: the schedule cannot run, updates as it goes, or is for another number of
            stages.
    """
    text = to_csv(schedule)
    check(schedule)
    if schedule.has_transfers:
        text = "".join(",".join(_reducing(line)) + "\n" for line in schedule.ranks)
    if not stages or stages[0].num_stages != schedule.stages:
        count = stages[0].num_stages if stages else 0
        raise ArgumentError(
            f"the schedule has {schedule.stages} stages and the model {count}",
            where="stages",
            hint="generate the schedule for as many stages as the model is split into",
        )
    make = cast("Callable[..., Runtime]", Runtime)  # its constructor has no annotations
    runtime = make(list(stages), schedule.micro_batches, loss_fn=loss)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "schedule.csv"
        file.write_text(text)
        if schedule.has_transfers:
            runtime._load_csv(str(file), format="compute_comms")
        else:
            runtime._load_csv(str(file), format="compute_only")
    return runtime


def _reducing(line: Sequence[Action]) -> list[str]:
    """The actions of a rank, with one that reduces gradients behind each stage's last backward."""
    last = {a.stage: index for index, a in enumerate(line) if a.kind in (Kind.B, Kind.W)}
    result = []
    for index, action in enumerate(line):
        result.append(str(action))
        if last.get(action.stage) == index:
            result.append(f"{action.stage}REDUCE_GRAD")
    return result
