"""A workload and its command line."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console

from graphopt.examples.common.case import Case
from graphopt.examples.common.checkpoint import Checkpoint, read_checkpoint
from graphopt.examples.common.errors import WorkloadError
from graphopt.examples.common.interrupts import Interrupts
from graphopt.examples.common.results import Results
from graphopt.examples.common.run import Run

BACKENDS = ("auto", "eager", "inductor", "none")


@dataclass(frozen=True)
class Workload:
    """A published system as a program.

    Attributes:
        name: of its folder.
        title: one line.
        run: trains, compares and draws; everything it finds goes into the `Run`.
        case: one training step, on a device.
        epochs: of a run on two cores.
        long_epochs: of a run on a GPU.
        backend: of graphopt, by default.
        command: what Python runs, where it is not ``graphopt.examples.NAME.train``.
    """

    name: str
    title: str
    run: Callable[[Run], None]
    case: Callable[[torch.device], Case]
    epochs: int
    long_epochs: int
    backend: str = "eager"
    command: str | None = None

    def main(self, arguments: Sequence[str] | None = None) -> None:
        """Run as a command; exits with 2 after bad input and with 130 when interrupted."""
        options = self._parse(arguments)
        console = Console(quiet=os.environ.get("RANK", "0") != "0", highlight=False)
        interrupts = Interrupts()
        try:
            _needs("matplotlib")  # before minutes of training, not at the figure
            device = _device(options.device)
            settings = {
                "workload": self.name,
                "seed": options.seed,
                "epochs": options.epochs or self._epochs(device),
            }
            checkpoint = Checkpoint(dict(settings))
            output = _folder(options.output or Path("results") / self.name)
            if options.resume:
                checkpoint = read_checkpoint(output / "checkpoint.pt", settings)
            backend = options.backend or self.backend
            results = Results(self.name, {**settings, "device": str(device), "backend": backend})
            if "RANK" in os.environ:  # set by torchrun
                torch.set_num_threads(1)
                dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
            run = Run(
                checkpoint=checkpoint,
                results=results,
                output=output,
                device=device,
                backend=backend,
                console=console,
                interrupts=interrupts,
            )
            if not options.resume:
                torch.manual_seed(options.seed)
            interrupts.install()
            self.run(run)
            if run.first:
                results.write(output / "results.json")
            results.show(console)
            console.print(f"wrote {output}/results.json")
        except WorkloadError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            console.print(f"interrupted; `--resume` goes on from {output}/checkpoint.pt")
            sys.exit(130)
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()

    def _epochs(self, device: torch.device) -> int:
        return self.epochs if device.type == "cpu" else self.long_epochs

    def _parse(self, arguments: Sequence[str] | None) -> argparse.Namespace:
        command = f"python -m {self.command or f'graphopt.examples.{self.name}.train'}"
        parser = argparse.ArgumentParser(prog=command, description=self.title, allow_abbrev=False)
        parser.add_argument(
            "--epochs",
            type=_positive,
            help=f"default: {self.epochs} on a CPU, {self.long_epochs} on a GPU",
        )
        parser.add_argument("--seed", type=_natural, default=0, help="of data and weights")
        parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
        parser.add_argument(
            "--backend",
            choices=BACKENDS,
            help=f"of graphopt; `none` is plain PyTorch; default: {self.backend}",
        )
        parser.add_argument(
            "--output",
            type=Path,
            help=f"folder of results, figure and checkpoint; default: results/{self.name}",
        )
        parser.add_argument("--resume", action="store_true", help="go on from its checkpoint")
        return parser.parse_args(arguments)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above zero")
    return int(text)


def _natural(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not zero or a number above it")
    return int(text)


def _needs(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise WorkloadError(f"{package} is not installed", "pip install 'graphopt[examples]'")


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise WorkloadError(f"device {name!r} cannot be used: {reason}", "--device cpu") from error
    if device.type not in ("cpu", "cuda"):
        raise WorkloadError(f"device {name!r} is neither cpu nor cuda", "--device cpu")
    if device.type == "cuda" and "LOCAL_RANK" in os.environ:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    return device


def _folder(path: Path) -> Path:
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
