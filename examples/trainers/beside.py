"""One training by PyTorch alone and once more through graphopt, and what is equal."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from graphopt.model.surface import report

BACKEND = "eager"  # its kernels are PyTorch's, so that all can be equal to the last bit


@dataclass(frozen=True)
class Run:
    """What a training has come to.

    Attributes:
        losses: in order, those of evaluations among them.
        weights: a checksum of the state of the model.
        seconds: the training took, captures included.
        model: that was trained, with graphopt the one that was given to it.
        beside: what else should be equal, such as generated tokens.
    """

    losses: tuple[float, ...]
    weights: str
    seconds: float
    model: nn.Module
    beside: tuple[object, ...] = ()

    def same(self, other: Run) -> bool:
        """Whether two runs agree to the last bit."""
        ours = (self.losses, self.weights, self.beside)
        return ours == (other.losses, other.weights, other.beside)


def timed(begin: float) -> float:
    """Seconds since then."""
    return time.perf_counter() - begin


def checksum(model: nn.Module) -> str:
    """Of names and bits of everything in the state of a model."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        bits: Tensor = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(name.encode() + bytes(bits.tolist()))
    return digest.hexdigest()[:16]


def compare(title: str, train: Callable[[bool], Run]) -> tuple[Run, Run]:
    """Run ``train(False)`` and ``train(True)``, and print both beside each other."""
    plain, ours = train(False), train(True)
    losses = "equal" if plain.losses == ours.losses else "DIFFERENT"
    weights = "equal" if plain.weights == ours.weights else "DIFFERENT"
    print(f"{title}")
    print(f"  losses   {_short(plain.losses)}  {losses}")
    print(f"  weights  {plain.weights} {ours.weights}  {weights}")
    if plain.beside or ours.beside:
        print(f"  beside   {'equal' if plain.beside == ours.beside else 'DIFFERENT'}")
    print(f"  seconds  PyTorch {plain.seconds:.2f}, graphopt {ours.seconds:.2f} with captures")
    return plain, ours


def _short(losses: Sequence[float]) -> str:
    first, last = losses[0], losses[-1]
    return f"{first:.6f} … {last:.6f} ({len(losses)})"


def captured(model: nn.Module) -> list[str]:
    """The calls of an optimized model that have graphs."""
    return [s.signature for s in report(model).specialisations]


def remove(folder: Path) -> None:
    """Remove what a trainer has written."""
    with suppress(FileNotFoundError):
        shutil.rmtree(folder)


def explained(run: Run) -> str:
    """What graphopt did."""
    return report(run.model).explain()
