"""One file that holds everything a run needs to go on."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graphopt.examples.common.errors import WorkloadError


@dataclass
class Checkpoint:
    """Of one run.

    Attributes:
        settings: what must be equal when the run goes on.
        finished: results of what has ended, by name.
        current: name and state of the loop that was running, if any.
    """

    settings: dict[str, Any]
    finished: dict[str, Any] = field(default_factory=dict)
    current: dict[str, Any] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """Replace the file as a whole: whoever reads it sees the old or the new state.

        Raises:
            WorkloadError: it cannot be written.
        """
        part = path.with_suffix(".part")
        state = {"settings": self.settings, "finished": self.finished, "current": self.current}
        try:
            torch.save(state, part)
            os.replace(part, path)
        except (OSError, RuntimeError) as error:  # torch.save raises either
            raise WorkloadError(
                f"{path} cannot be written: {str(error).splitlines()[0]}",
                "see to it that its folder exists and has room",
            ) from error


def check_readable(name: str, value: object) -> None:
    """Refuse a value that could be written, but that no resumed run could read.

    Raises:
        TypeError: it holds more than numbers, texts, tensors, lists and dicts, such as a NumPy
            scalar.
    """
    buffer = io.BytesIO()
    try:
        torch.save(value, buffer)
        buffer.seek(0)
        torch.load(buffer, weights_only=True)
    except Exception as error:
        raise TypeError(
            f"{name!r} returns more than numbers, texts, tensors, lists and dicts, which --resume "
            "could not read; convert it, as by float()"
        ) from error


def random_state() -> list[Tensor]:
    """Where the global random streams are: of the CPU, and of each GPU."""
    return [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]


def set_random_state(states: list[Tensor]) -> None:
    """Put the streams there; GPUs that this machine lacks are left out."""
    torch.set_rng_state(states[0])
    torch.cuda.set_rng_state_all(states[1:][: torch.cuda.device_count()])


def read_checkpoint(path: Path, settings: Mapping[str, Any]) -> Checkpoint:
    """What an interrupted run of the same settings has left.

    Raises:
        WorkloadError: there is no file, it is not a checkpoint, or it has other settings.
    """
    if not path.exists():
        raise WorkloadError(f"there is no checkpoint at {path}", "leave out --resume")
    try:
        state = torch.load(path, weights_only=True)
        found = Checkpoint(state["settings"], state["finished"], state["current"])
    except Exception as error:
        raise WorkloadError(
            f"{path} is no checkpoint, or is cut off or damaged ({type(error).__name__})",
            "remove it, or give another --output",
        ) from error
    for name in sorted({*settings, *found.settings}):
        theirs, ours = found.settings.get(name), settings.get(name)
        if theirs != ours:
            raise WorkloadError(
                f"the checkpoint {path} was made with {name} {theirs}, and this run has {ours}",
                f"use --{name} {theirs}, or another --output"
                if name != "workload"
                else "give another --output",
            )
    return found
