"""How far a training is: a bar on a terminal, a line per tenth elsewhere."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar


class Progress:
    """Shown while a training runs, on rank 0."""

    def __init__(self, console: Console, name: str, steps: int, done: int) -> None:
        self._console, self._name, self._steps, self._done = console, name, steps, done
        self._start = time.monotonic()
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[value]}"),
            TimeRemainingColumn(),
        )
        self._bar = Bar(*columns, console=console, disable=not console.is_terminal)
        self._task = self._bar.add_task(name, total=steps, completed=done, value="")

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def advance(self, value: float) -> None:
        """One step more, with what it returned."""
        self._done += 1
        self._bar.update(self._task, completed=self._done, value=f"{value:.4g}")
        tenths = 10 * self._done // self._steps
        if not self._console.is_terminal and tenths > 10 * (self._done - 1) // self._steps:
            seconds = time.monotonic() - self._start
            self._console.print(
                f"{self._name}: step {self._done}/{self._steps}, {value:.4g}, {seconds:.0f} s"
            )
