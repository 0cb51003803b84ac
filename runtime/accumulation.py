"""What a model's steps share on one rank: whether they are micro-batches, and the loss scale."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor, nn


class Scaler(Protocol):
    """What a `torch.amp.GradScaler` is to the curvature."""

    def get_scale(self) -> float:
        """Factor of the loss."""


@dataclass(kw_only=True)
class Accumulation:
    """Gradient accumulation of one model.

    Attributes:
        synchronise: whether the backward of the forward passes made now ends a step.
        scaler: multiplies the loss before its backward (mixed precision).
    """

    synchronise: bool = True
    scaler: Scaler | None = None

    @property
    def loss_scale(self) -> float:
        """What the loss of this step was multiplied with."""
        return 1.0 if self.scaler is None else self.scaler.get_scale()

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
    """The one rank there is; stands where `graphopt.runtime.ranks.workers.Workers` would."""

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

    def whole(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """This rank's state."""
        return state

    def copy(self) -> Alone:
        """For a copy of the model."""
        return Alone()

    def settle(self, state: dict[str, Tensor]) -> None:
        """Nothing is under way between steps."""
