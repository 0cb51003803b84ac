"""What a row of the operator catalogue writes to: a recorder plus a pool of values to use."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any, TypeVar

import torch
from torch import Tensor

from graphopt.analysis.hints import hint
from graphopt.plan import Role
from graphopt.testing.recording import Recorder

T = TypeVar("T")

MAX_NUMEL = 256
"""Operators that grow a tensor leave one above this size alone."""

SYMBOLS: Mapping[str, int] = {"batch": 3, "length": 4}
"""Names that stand for sizes in shapes of inputs, and what they are in the recorded call."""


def is_fixed(*sizes: object) -> bool:
    """Whether none of them is a symbol."""
    return all(isinstance(size, int) for size in sizes)


def least(size: Any) -> int:
    """The smallest number that a size can be."""
    return int(size) if is_fixed(size) else 2


def numel(value: Tensor) -> int:
    """How many elements a tensor has in the recorded call."""
    return prod(hint(size) or 0 for size in value.shape)


class Choices:
    """A finite tape of small integers, read as decisions; an exhausted tape reads as zeros.

    Every tape means something, so deleting or lowering an entry gives another valid program: that
    is what lets hypothesis shrink a graph to a few nodes.
    """

    def __init__(self, tape: Sequence[int]) -> None:
        self._tape = list(tape)

    def integer(self, low: int, high: int) -> int:
        """A number of the closed range; `low` for a zero."""
        return low + (self._tape.pop(0) if self._tape else 0) % (high - low + 1)

    def pick(self, options: Sequence[T]) -> T:
        """One of `options`; the first for a zero."""
        return options[self.integer(0, len(options) - 1)]

    def flag(self) -> bool:
        """A decision; no for a zero."""
        return self.integer(0, 1) == 1

    def recent(self, options: Sequence[T]) -> T:
        """One of `options`; the last for a zero, and for half of all other numbers."""
        position = self.integer(0, 2 * len(options) - 1)
        return options[-1 - max(0, position - len(options))]


class Builder:
    """Grows a graph: fresh inputs, the pool of values so far, random choices among them."""

    def __init__(self, recorder: Recorder, *, training: bool) -> None:
        self.recorder = recorder
        self.training = training
        self.pool: list[Tensor] = []
        self.computed: list[Tensor] = []
        self.scope = ""
        self._names: set[tuple[Role, str]] = set()
        self._params: list[Tensor] = []
        self._num_inputs = 0

    def enter(self, scope: str) -> None:
        """Name what follows as the submodule `scope`."""
        self.scope = scope
        self.recorder.module = scope

    def add(self, value: Tensor) -> None:
        """Offer the result of an operator to later operators and to the outputs."""
        self.pool.append(value)
        self.computed.append(value)

    def param(self, name: str, shape: Sequence[int], choices: Choices | None = None) -> Tensor:
        """A parameter: with `choices`, now and then one of an earlier operator (a tied weight)."""
        tied = [p for p in self._params if p.shape == torch.Size(shape)]
        if choices is not None and tied and choices.integer(0, 2) == 2:
            return choices.pick(tied)
        new = self.recorder.placeholder(
            Role.PARAM, self._unique(Role.PARAM, name), shape, requires_grad=self.training
        )
        self._params.append(new)
        return new

    def buffer(self, name: str, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """A buffer of the model."""
        return self.recorder.placeholder(Role.BUFFER, self._unique(Role.BUFFER, name), shape, dtype)

    def input(
        self,
        shape: Sequence[Any],
        dtype: torch.dtype = torch.float32,
        *,
        requires_grad: bool = False,
    ) -> Tensor:
        """A plain input; floating ones join the pool. Names in its shape are symbols."""
        name = str(self._num_inputs)
        self._num_inputs += 1
        shape = [
            self.recorder.size(size, f"{name}.{dimension}") if isinstance(size, str) else size
            for dimension, size in enumerate(shape)
        ]
        new = self.recorder.placeholder(
            Role.INPUT, name, shape, dtype, requires_grad=requires_grad and self.training
        )
        if dtype.is_floating_point:
            self.pool.append(new)
        return new

    def mutate(self, buffer: Tensor, new: Tensor) -> None:
        """Let the step write `new` back into `buffer`."""
        slot = self.recorder.slots[self.recorder.node(buffer)]
        self.recorder.mutations[slot.name] = new

    def value(
        self,
        choices: Choices,
        fits: Callable[[Tensor], bool] = lambda _: True,
        fresh: Sequence[int] = (2, 3),
    ) -> Tensor:
        """A value of the pool that `fits`, mostly a recent one; else a new input."""
        options = [v for v in self.pool if v.is_floating_point() and fits(v)]
        return choices.recent(options) if options else self.input(self.batched(fresh))

    def batched(self, shape: Sequence[int]) -> Sequence[Any]:
        """A shape whose first size is the batch, where that is a symbol."""
        return ["batch", *shape[1:]] if self.recorder.symbolic else shape

    def _unique(self, role: Role, name: str) -> str:
        name = f"{self.scope}.{name}" if self.scope else name
        candidate, count = name, 0
        while (role, candidate) in self._names:
            count += 1
            candidate = f"{name}_{count}"
        self._names.add((role, candidate))
        return candidate
