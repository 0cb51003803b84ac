"""`check_runtime`: everything that runtime parts have to prove, by training a small model.

Each obligation is one row of a table. It is checked in this process, then on two ranks that talk
over loopback.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import pickle
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from graphopt import registry
from graphopt.errors import ArgumentError, GraphoptError
from graphopt.passbase import Pass
from graphopt.pipeline import Pipeline
from graphopt.pipeline.spec import format_spec, parse_spec
from graphopt.testing.runtime_obligations import OBLIGATIONS
from graphopt.testing.runtime_runs import Factory, Run, Subject, small_model

WORLD = 2
# How long ranks may take, and how long one of them waits for another.
SECONDS, PATIENCE = 300.0, 60.0
# The fact that gradients are averaged over ranks.
AVERAGED = "grouped"


def check_runtime(
    passes: str | Sequence[Pass] | Pass, *, model: Factory = small_model, ranks: bool = True
) -> None:
    """Prove the runtime parts of some passes, or say in one sentence what they break.

    Trials leave no trace; a run that was saved and loaded goes on bit for bit; copies are
    independent; ``no_sync`` only accumulates; micro-batches equal one batch (where they do without
    graphopt); state changes in `finish` only; and all of this on two ranks, too, whose parameters
    stay equal.

    Args:
        passes: one pass, several, or a spec.
        model: makes the model and an example batch, whose leading dimension is that of examples.
        ranks: whether to check on two ranks, too. These are processes: `model` has to be a
            function of a module, and a script needs ``if __name__ == "__main__"``. The usual pass
            that averages gradients is added where there is none.

    Raises:
        AssertionError: an obligation of `OBLIGATIONS` is violated; or no pass left a plan part, so
            that nothing was proved.
        ArgumentError: `model` cannot be sent to other processes.
    """
    subject = Subject(_passes(passes), model)
    on_ranks = _on_ranks(subject) if ranks else None
    proved = _check(subject)
    if on_ranks is not None:
        proved |= _check_on_ranks(on_ranks)
    assert proved, (
        f"no pass of {format_spec(subject.passes)!r} left a plan part, so nothing was proved; give "
        "`model=` with what it is about"
    )


def _passes(passes: str | Sequence[Pass] | Pass) -> tuple[Pass, ...]:
    if isinstance(passes, str):
        return parse_spec(passes)
    return (passes,) if isinstance(passes, Pass) else tuple(passes)


def _check(subject: Subject) -> set[str]:
    """Check all obligations here; the names of the plan parts that there are."""
    where = f" on rank {subject.rank} of {subject.world}" if subject.world > 1 else ""
    name = "runs"
    try:
        run = Run(subject)
        run.steps(1)
        plans = [variant.entry.plan for variant in run.controller.variants]
        found = {part.name for plan in plans for part in plan.parts}
        if found:
            for name, obligation in OBLIGATIONS.items():  # noqa: B007
                obligation(subject)
    except Exception as error:
        text = error.message if isinstance(error, GraphoptError) else str(error)
        kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
        raise AssertionError(
            f"{format_spec(subject.passes)!r} fails {name!r}{where}: {kind}{text}"
        ) from error
    return found


# -- two ranks -------------------------------------------------------------------------------------


def _on_ranks(subject: Subject) -> Subject:
    """The same on several ranks, if it can be sent there."""
    subject = replace(subject, passes=_reducing(subject.passes), world=WORLD)
    try:
        pickle.dumps(subject)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ArgumentError(
            f"the model or a pass cannot be sent to another process: {error}",
            hint="define them at the top level of a module, or check with ranks=False",
        ) from error
    return subject


def _check_on_ranks(subject: Subject) -> set[str]:
    """Check on ranks that talk over loopback, bounded in time."""
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            spawn.Process(target=_rank, args=(replace(subject, rank=rank), folder), daemon=True)
            for rank in range(WORLD)
        ]
        for process in processes:
            process.start()
        try:
            return _answer(processes, Path(folder))
        finally:
            for process in processes:
                process.kill()
                process.join()


def _answer(processes: Sequence[multiprocessing.process.BaseProcess], folder: Path) -> set[str]:
    """What the ranks found out; the first failure counts, the others only follow from it."""
    deadline = time.monotonic() + SECONDS
    while True:
        # Asked before the files are: what a process has written is there when it has ended.
        ended = [not process.is_alive() for process in processes]
        for rank in range(len(processes)):
            if (failed := folder / f"failed{rank}").exists():
                raise AssertionError(failed.read_text())
            assert not ended[rank] or (folder / f"proved{rank}").exists(), (
                f"rank {rank} of {len(processes)} ended with exit code {processes[rank].exitcode}"
            )
        if all(ended):
            return set((folder / "proved0").read_text().split())
        assert time.monotonic() < deadline, f"two ranks did not come to an end in {SECONDS:g} s"
        time.sleep(0.05)


def _rank(subject: Subject, folder: str) -> None:
    """What one of the processes does."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=subject.rank,
        world_size=subject.world,
        timeout=timedelta(seconds=PATIENCE),
    )
    try:
        _write(folder, f"proved{subject.rank}", " ".join(_check(subject)))
    except BaseException as error:
        _write(folder, f"failed{subject.rank}", str(error))
    # Threads of Gloo may outlive the interpreter and abort a process that ends in the usual way.
    atexit.register(os._exit, 0)


def _write(folder: str, name: str, text: str) -> None:
    """A file that is complete as soon as it is there."""
    unfinished = Path(folder, f".{name}")
    unfinished.write_text(text)
    unfinished.rename(Path(folder, name))


def _reducing(passes: tuple[Pass, ...]) -> tuple[Pass, ...]:
    """The passes, with one that averages gradients; else each rank has a model of its own."""
    if any(AVERAGED in pass_.provides for pass_ in passes):
        return passes
    usual = parse_spec(registry.PRESETS["auto"][1])
    passes = (*passes, *(pass_ for pass_ in usual if AVERAGED in pass_.provides))
    Pipeline(passes)
    return passes
