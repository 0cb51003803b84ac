"""What the options of a workload may be, and the device and folder that they name."""

from __future__ import annotations

import argparse
import importlib.util
import os
from pathlib import Path

import torch
import torch.distributed as dist

from graphopt.examples.common.errors import WorkloadError

BACKENDS = ("auto", "eager", "inductor", "none")
_SEEDS = 2**31  # products with it, such as `Run.generator` takes, fit into 64 bits


def positive(text: str) -> int:
    """A whole number above zero."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above zero")
    return int(text)


def seed(text: str) -> int:
    """Where random streams start."""
    if not text.isdecimal() or int(text) >= _SEEDS:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to {_SEEDS - 1}")
    return int(text)


def path(text: str) -> Path:
    """A folder's."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty")
    return Path(text)


def needs(package: str) -> None:
    """Raise where a package is missing."""
    if importlib.util.find_spec(package) is None:
        raise WorkloadError(f"{package} is not installed", "pip install 'graphopt[examples]'")


def device(name: str) -> torch.device:
    """The device that trains; in a job, that of this rank."""
    if name.split(":")[0] not in ("cpu", "cuda"):
        raise WorkloadError(f"device {name!r} is none of cpu, cuda and cuda:N", "--device cpu")
    try:
        found = torch.device(name)
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise WorkloadError(f"device {name!r} cannot be used: {reason}", "--device cpu") from error
    if found.type == "cuda" and "LOCAL_RANK" in os.environ:
        found = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(found)
    return found


def join(device: torch.device) -> None:
    """Join the job that torchrun has started, if any."""
    if "RANK" not in os.environ:
        return
    torch.set_num_threads(1)
    try:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    except ValueError as error:  # as of a variable that is missing
        raise WorkloadError(
            f"RANK is set, but the job cannot be joined: {error}", "start it by torchrun"
        ) from error


def folder(path: Path) -> Path:
    """Make a folder that can be written to."""
    if path.is_file():
        raise WorkloadError(f"{path} is a file, not a folder", "give another --output")
    probe = path / ".writable"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise WorkloadError(
            f"cannot write to the folder {path}: {error.strerror}", "give another --output"
        ) from error
    return path
