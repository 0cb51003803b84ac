"""What a refusal is: a row of the documented table, with the examples that prove it."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from graphopt.errors import CaptureError

Step = Callable[[nn.Module], object]


class Small(nn.Module):
    """A linear map, then `body` on ``(model, its output, further inputs)``."""

    def __init__(self, body: Callable[..., Any]) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)
        self.register_buffer("table", torch.ones(4))
        self.generator = torch.Generator().manual_seed(3)
        self.of_numpy = np.random.default_rng(3)
        self.of_python = random.Random(3)
        self.kept: list[object] = []
        self.layerdrop = 0.1
        self.body = body

    def forward(self, x: Tensor, *more: Any) -> Any:
        return self.body(self, self.lin(x), *more)


def small(body: Callable[..., Any]) -> Callable[[], Small]:
    """Makes such models."""
    return lambda: Small(body)


def train(model: nn.Module, *more: Any, x: Tensor | None = None) -> object:
    """One step; its outputs, gradients and buffers."""
    y = model(torch.randn(3, 4) if x is None else x, *more)
    y.square().sum().backward()
    return [y.detach().clone(), *results(model)]


def results(model: nn.Module) -> list[Tensor | None]:
    """Gradients and buffers."""
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    return [*gradients, *(b.clone() for b in model.buffers())]


@dataclass(frozen=True)
class Way:
    """A way out that the table names: the same step by another model, or by other calls.

    Attributes:
        model: makes the model.
        step: what is done with it.
        same: whether the results are those of the example in eager, up to rounding.
    """

    model: Callable[[], nn.Module]
    step: Step = train
    same: bool = True


@dataclass(frozen=True)
class Example:
    """A call that is refused.

    Attributes:
        name: for the test.
        model: makes the model.
        words: pattern of the error's message.
        line: part of the source line that the error names; empty where it is not known.
        hint: pattern of what the error says to try.
        step: what is done with the model.
        error: the type.
        options: of `optimize`.
        plain: whether ``fallback="eager"`` runs it as eager does.
        way: what the table says to do instead.
    """

    name: str
    model: Callable[[], nn.Module]
    words: str
    line: str = ""
    hint: str = ""
    step: Step = train
    error: type[Exception] = CaptureError
    options: Mapping[str, Any] = field(default_factory=dict)
    plain: bool = True
    way: Way | None = None


@dataclass(frozen=True)
class Refusal:
    """One row of the table.

    Attributes:
        name: for tests.
        what: is done.
        why: it is refused.
        instead: what to do.
        examples: of it.
        tested_by: a test elsewhere that proves it, as ``file::test``, where it takes several ranks.
    """

    name: str
    what: str
    why: str
    instead: str
    examples: tuple[Example, ...] = ()
    tested_by: str = ""


def seed() -> None:
    """Start all random numbers anew."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)


def random_states() -> tuple[object, ...]:
    """Where all random numbers are."""
    name, keys, *rest = np.random.get_state()
    return (tuple(torch.get_rng_state().tolist()), random.getstate(), name, tuple(keys), *rest)
