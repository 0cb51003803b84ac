"""What a workload is given to run: trainings that can be resumed, and a place for results."""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from rich.console import Console
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

import graphopt
from graphopt.examples.common.checkpoint import (
    Checkpoint,
    check_readable,
    random_state,
    set_random_state,
)
from graphopt.examples.common.interrupts import Interrupts
from graphopt.examples.common.progress import Progress
from graphopt.examples.common.results import Criterion, Results, Value

T = TypeVar("T")
_SECONDS_BETWEEN_CHECKPOINTS = 60.0


class Stateful(Protocol):
    """Anything that a checkpoint can hold."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any], /) -> object: ...


class Run:
    """One run of a workload: an output folder, a device, a seed.

    Attributes:
        seed: of the run; data and weights derive from it.
        epochs: how long to train.
        device: where to train.
        backend: of graphopt; ``none`` leaves models to plain PyTorch.
        output: the folder that is written to.
        results: what has been found so far.
    """

    def __init__(
        self,
        *,
        checkpoint: Checkpoint,
        results: Results,
        output: Path,
        device: torch.device,
        console: Console,
        interrupts: Interrupts,
    ) -> None:
        self.seed = int(results.settings["seed"])
        self.epochs = int(results.settings["epochs"])
        self.device = device
        self.backend = str(results.settings["backend"])
        self.output = output
        self.results = results
        self.console = console
        self._checkpoint = checkpoint
        self._interrupts = interrupts

    @property
    def first(self) -> bool:
        """Whether this process writes files and prints: rank 0 of a job, or the only process."""
        return not dist.is_initialized() or dist.get_rank() == 0

    def generator(self, stream: int = 0) -> torch.Generator:
        """Random numbers on the CPU that depend on the seed and on ``stream`` only."""
        return torch.Generator().manual_seed(1_000_003 * self.seed + stream)

    def optimize(self, model: nn.Module, passes: str = "auto", **options: Any) -> nn.Module:
        """Move ``model`` to the device and let graphopt compile its steps, in place."""
        model.to(self.device)
        if self.backend == "none":
            return model
        graphopt.optimize(model, passes=passes, backend=self.backend, **options)  # in place
        return model

    def fit(
        self,
        name: str,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss: Callable[[int], Tensor],
        steps: int,
        *,
        scheduler: LRScheduler | None = None,
        clip: float | None = None,
    ) -> list[float]:
        """Train ``model``: the losses of all steps.

        Args:
            name: of this training; unique in the run.
            model: its weights after the last step are what counts.
            optimizer: of ``model``.
            loss: of a step's number, a scalar; draws its batch from that number (see `generator`),
                so that a resumed training sees what an uninterrupted one would.
            steps: how many.
            scheduler: advanced after each step.
            clip: largest norm of the gradients of a step.
        """

        def step(number: int) -> Tensor:
            optimizer.zero_grad()
            value = loss(number)
            value.backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
            return value.detach()

        parts: list[Stateful] = [model, optimizer]
        if scheduler is not None:
            parts.append(scheduler)
        return self.loop(name, parts, step, steps)

    def loop(
        self,
        name: str,
        parts: Sequence[Stateful],
        step: Callable[[int], Tensor],
        steps: int,
        *,
        enough: Callable[[float], bool] = lambda value: False,
    ) -> list[float]:
        """Call ``step`` with 0, 1, ... and keep what it returns; resumed where it was interrupted.

        Args:
            name: unique in the run.
            parts: everything that ``step`` changes, in the same order in every run.
            step: returns a scalar to be shown.
            steps: at most.
            enough: of what a step returned; ends the loop behind it.
        """
        done = self._checkpoint.finished.get(name) or self._checkpoint.current.get(name)
        values: list[float] = []
        if done:
            for part, kept in zip(parts, done["parts"], strict=True):
                part.load_state_dict(kept)
            values = list(done["values"])
            set_random_state(done["random"])
        before = done["seconds"] if done else 0.0
        start = written = time.monotonic()

        def state() -> dict[str, Any]:
            seconds = before + time.monotonic() - start
            # Copies: the same model may be trained on under another name.
            return {
                "parts": [copy.deepcopy(part.state_dict()) for part in parts],
                "values": list(values),
                "seconds": seconds,
                "random": random_state(),
            }

        with self._interruptible(), Progress(self.console, name, steps, len(values)) as progress:
            while len(values) < steps and not (values and enough(values[-1])):
                values.append(float(step(len(values))))
                progress.advance(values[-1])
                late = time.monotonic() - written > _SECONDS_BETWEEN_CHECKPOINTS
                stop = self._interrupts.asked(self.device)
                if stop or (late and not dist.is_initialized()):
                    self._checkpoint.current = {name: state()}
                    self._write()
                    written = time.monotonic()
                if stop:
                    raise KeyboardInterrupt
        self._checkpoint.finished[name] = state()
        self._checkpoint.current.pop(name, None)  # that of another name is still to come
        self.results.seconds[name] = self._checkpoint.finished[name]["seconds"]
        self._write()
        return values

    def once(self, name: str, compute: Callable[[], T]) -> T:
        """The value of ``compute``: numbers, texts, tensors, lists and dicts; kept for `--resume`.

        For what is not trained step by step, such as a baseline.

        Raises:
            TypeError: the value is of another kind.
        """
        if name not in self._checkpoint.finished:
            start = time.monotonic()
            value = compute()
            seconds = time.monotonic() - start
            check_readable(name, value)
            found = {"value": value, "seconds": seconds, "random": random_state()}
            self._checkpoint.finished[name] = found
            self._write()
        found = self._checkpoint.finished[name]
        set_random_state(found["random"])
        self.results.seconds[name] = found["seconds"]
        kept: T = found["value"]
        return kept

    def require(
        self,
        name: str,
        value: float,
        *,
        at_most: float | None = None,
        at_least: float | None = None,
        gate: bool = True,
    ) -> None:
        """Record an acceptance criterion with the value that was measured."""
        if (at_most is None) == (at_least is None):
            raise ValueError("a criterion has one bound")
        relation, bound = ("<=", at_most) if at_most is not None else (">=", at_least)
        assert bound is not None
        self.results.criteria.append(Criterion(name, float(value), relation, float(bound), gate))

    def value(self, name: str, value: Value) -> None:
        """Record a number that nothing is required of; the name tells its unit."""
        self.results.values[name] = value

    def row(self, table: str, **columns: Value) -> None:
        """Add a row to a table; the rows of one table have the same columns."""
        self.results.tables.setdefault(table, []).append(columns)

    def _write(self) -> None:
        if self.first:
            self._checkpoint.write(self.output / "checkpoint.pt")

    @contextlib.contextmanager
    def _interruptible(self) -> Iterator[None]:
        self._interrupts.inside = True
        try:
            yield
        finally:
            self._interrupts.inside = False
