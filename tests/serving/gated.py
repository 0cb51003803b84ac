"""A stand-in for a model that waits while it is shut, and remembers what it was given."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from graphopt.runtime.serving import Dispatcher

PATIENCE = 60.0


class Gated:
    """Computes ``2 x + 1`` of a batch ``[n, 2]``; a row whose second value is -1 makes it raise.

    Attributes:
        batches: the rows of each batch, in order; those of rehearsals are left out.
    """

    def __init__(self) -> None:
        self.batches: list[list[tuple[int, int]]] = []
        self.entered = threading.Semaphore(0)
        self._open = threading.Event()
        self._open.set()

    def __call__(self, x: Tensor) -> Tensor:
        self.batches.append([(int(a), int(b)) for a, b in x.tolist()])
        self.entered.release()
        assert self._open.wait(PATIENCE)
        if (x[:, 1] == -1).any():
            raise ValueError(f"{int(x[x[:, 1] == -1][0, 0])} cannot be computed")
        return 2 * x + 1

    def serve(self, sizes: Sequence[int] = (1, 2, 4, 8), capacity: int | None = None) -> Dispatcher:
        """A dispatcher of this model."""
        dispatcher = Dispatcher(self, row(0, 0), sizes=sizes, capacity=capacity)
        self.batches.clear()
        self.entered = threading.Semaphore(0)
        return dispatcher

    @contextmanager
    def busy(self, dispatcher: Dispatcher) -> Iterator[None]:
        """Within, the dispatcher computes one request, ``(99, 0)``, and comes to no other."""
        self._open.clear()
        first = dispatcher.submit(row(99, 0))
        assert self.entered.acquire(timeout=PATIENCE)
        try:
            yield
        finally:
            self._open.set()
        assert is_answer(first.result(PATIENCE), 99, 0)

    def first_seen(self) -> list[tuple[int, int]]:
        """All rows in the order in which they first came; padding and retries come again."""
        return list(dict.fromkeys(row for batch in self.batches for row in batch))


def row(caller: int, number: int) -> Tensor:
    """A request."""
    return torch.tensor([caller, number], dtype=torch.float32)


def is_answer(found: object, caller: int, number: int) -> bool:
    """Whether this is the answer to that request."""
    return isinstance(found, Tensor) and found.tolist() == [2 * caller + 1, 2 * number + 1]
