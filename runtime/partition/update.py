"""Gradients of a stage over micro-batches, and what a step ends with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.optim import Optimizer

from graphopt.plan import Role, Slot
from graphopt.runtime.engine.step import Step
from graphopt.runtime.session import Session

if TYPE_CHECKING:
    from graphopt.runtime.partition.engine import PipelineEngine


@dataclass(eq=False)
class Gathered:
    """Sums over micro-batches.

    Attributes:
        values: by name.
        count: of micro-batches.
    """

    values: dict[str, Tensor] = field(default_factory=dict)
    count: int = 0

    @property
    def owned(self) -> bool:
        """Whether the sums lie in memory of their own; a first gradient may be a view."""
        return self.count > 1

    def set(self, sums: dict[str, Tensor]) -> None:
        """The sums with one more micro-batch."""
        self.values, self.count = sums, self.count + 1

    def add(self, found: Mapping[str, Tensor]) -> None:
        """Add what one more micro-batch gave."""
        sums = dict(self.values)
        for name, value in found.items():
            sums[name] = sums[name] + value if name in sums else value
        self.set(sums)

    def take(self) -> dict[str, Tensor]:
        """The sums; forgets them."""
        found, self.values, self.count = self.values, {}, 0
        return found


def gradients_of(results: Mapping[Slot, Any], parameters: Iterable[str]) -> dict[str, Tensor]:
    """Gradients of parameters among the results of a backward."""
    own = set(parameters)
    found = ((s.name, v) for s, v in results.items() if s.role is Role.GRAD and s.name in own)
    return {name: value for name, value in found if value is not None}


def finish(
    session: Session, engine: PipelineEngine, step: Step, gradients: dict[str, Tensor]
) -> None:
    """Let all methods do what a backward ends with, the last pass first."""
    for runtime, part in reversed(session.parts(engine.plan)):
        if runtime.finishes(part):
            session.finish(runtime, part, step, gradients)


def renew(model: nn.Module, optimizer: Optimizer | None, gradients: Mapping[str, Tensor]) -> None:
    """Take an optimizer step, or leave the gradients to the caller's optimizer.

    Args:
        model: whose parameters have gradients of an earlier step, or none.
        optimizer: leaves parameters without a gradient alone: those of other stages.
        gradients: by name.
    """
    for name, parameter in model.named_parameters():
        gradient = gradients.get(name)
        if optimizer is not None:
            parameter.grad = gradient
        elif gradient is not None:
            # As a backward does, which adds to what is there.
            before = parameter.grad
            parameter.grad = gradient if before is None else before.add_(gradient)
    if optimizer is not None:
        optimizer.step()
