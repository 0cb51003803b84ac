"""What a runtime part needs that runs whole optimizer steps: loss, optimizer, and calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn
from torch.optim import Optimizer

Args = Sequence[Any]
Kwargs = Mapping[str, Any]


class Called(Protocol):
    """One kind of call of a model, captured and built."""

    @property
    def call(self) -> Callable[..., object]:
        """Takes the model and the arguments of the call."""

    @property
    def engine(self) -> Callable[..., Any]:
        """What runs the graph."""


@dataclass(frozen=True)
class OwnedStep:
    """The model of a session, and what its steps consist of beside it.

    Attributes:
        model: gives the model.
        loss: of its output and the target; ``None`` where the output is, or has, the loss.
        optimizer: renews the parameters; ``None`` where the caller does.
        micro_batches: into which a batch is cut.
        kind_of: the captured kind of a call, made where there is none yet.
        untouched: within, a call may run without a trace.
    """

    model: Callable[[], nn.Module]
    loss: Callable[[Any, Any], Any] | None
    optimizer: Optimizer | None
    micro_batches: int
    kind_of: Callable[[Args, Kwargs], Called]
    untouched: Callable[[Args, Kwargs], AbstractContextManager[None]]
