"""What a model's steps share on one rank: whether they are micro-batches, and the loss scale."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn


@dataclass
class Accumulation:
    """Gradient accumulation of one model.

    Attributes:
        synchronise: whether the backward of the forward passes made now ends a step.
        loss_scale: what the loss was multiplied with before its backward (mixed precision).
    """

    synchronise: bool = True
    loss_scale: float = 1.0

    @contextmanager
    def silent(self) -> Iterator[None]:
        """Within, forward passes are made whose backward only accumulates."""
        before, self.synchronise = self.synchronise, False
        try:
            yield
        finally:
            self.synchronise = before


@dataclass
class Alone(Accumulation):
    """The one rank there is; stands where `graphopt.runtime.workers.Workers` would."""

    size: ClassVar[int] = 1
    channel: ClassVar[str] = ""

    def start(self, model: nn.Module) -> None:
        """Nobody has other parameters."""

    def notes(self) -> tuple[str, ...]:
        """Nothing to report."""
        return ()

    def agree(self, topic: str, mine: str, decide: Callable[[], str]) -> str:
        """This rank's decision."""
        return decide()

    def copy(self) -> Alone:
        """For a copy of the model."""
        return Alone()

    def settle(self, state: dict[str, Tensor]) -> None:
        """Nothing is under way between steps."""
