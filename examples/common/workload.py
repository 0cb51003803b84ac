"""A workload and its command line."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from rich.console import Console

from graphopt.examples.common import arguments
from graphopt.examples.common.case import Case
from graphopt.examples.common.checkpoint import Checkpoint, read_checkpoint
from graphopt.examples.common.errors import WorkloadError
from graphopt.examples.common.interrupts import Interrupts
from graphopt.examples.common.results import Results
from graphopt.examples.common.run import Run


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

    def main(self, given: Sequence[str] | None = None) -> None:
        """Run as a command; exits with 2 after bad input and with 130 when interrupted."""
        options = self._parse(given)
        output = options.output or Path("results") / self.name
        first = os.environ.get("RANK", "0") == "0"
        console = Console(quiet=not first, highlight=False)
        kept = output / "checkpoint.pt"
        try:
            self._run(options, output, first, console)
        except WorkloadError as error:
            if first:
                print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            console.print(
                f"interrupted; `--resume` goes on from {kept}"
                if kept.exists()
                else "interrupted before the first checkpoint"
            )
            sys.exit(130)
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()

    def _run(
        self, options: argparse.Namespace, output: Path, first: bool, console: Console
    ) -> None:
        arguments.needs("matplotlib")  # before minutes of training, not at the figure
        device = arguments.device(options.device)
        epochs = self.epochs if device.type == "cpu" else self.long_epochs
        settings = {
            "workload": self.name,
            "seed": options.seed,
            "epochs": options.epochs or epochs,
            "device": device.type,
            "backend": options.backend or self.backend,
        }
        checkpoint = Checkpoint(dict(settings))
        with _alone(output, first):
            if options.resume:
                checkpoint = read_checkpoint(output / "checkpoint.pt", settings)
            arguments.join(device)
            if first and not options.resume:  # what an earlier run has left is not this one's
                for left in ("checkpoint.pt", "results.json"):
                    (output / left).unlink(missing_ok=True)
            results = Results(self.name, settings)
            interrupts = Interrupts()
            run = Run(
                checkpoint=checkpoint,
                results=results,
                output=output,
                device=device,
                console=console,
                interrupts=interrupts,
            )
            if not options.resume:
                torch.manual_seed(options.seed)
            interrupts.install()
            self.run(run)
            if first:
                results.write(output / "results.json")
            results.show(console)
            console.print(f"wrote {output}/results.json")

    def _parse(self, given: Sequence[str] | None) -> argparse.Namespace:
        command = f"python -m {self.command or f'graphopt.examples.{self.name}.train'}"
        parser = argparse.ArgumentParser(prog=command, description=self.title, allow_abbrev=False)
        parser.add_argument(
            "--epochs",
            type=arguments.positive,
            help=f"default: {self.epochs} on a CPU, {self.long_epochs} on a GPU",
        )
        parser.add_argument("--seed", type=arguments.seed, default=0, help="of data and weights")
        parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
        parser.add_argument(
            "--backend",
            choices=arguments.BACKENDS,
            help=f"of graphopt; `none` is plain PyTorch; default: {self.backend}",
        )
        parser.add_argument(
            "--output",
            type=arguments.path,
            help=f"folder of results, figure and checkpoint; default: results/{self.name}",
        )
        parser.add_argument("--resume", action="store_true", help="go on from its checkpoint")
        return parser.parse_args(given)


@contextlib.contextmanager
def _alone(output: Path, first: bool) -> Iterator[None]:
    """Nobody else writes to a folder; in a job that is what its first rank sees to."""
    if not first:
        yield
        return
    try:
        with FileLock(arguments.folder(output) / ".lock", timeout=0):
            yield
    except Timeout as error:
        raise WorkloadError(f"another run writes to {output}", "give another --output") from error
