"""The queue against a list, step by step."""

from __future__ import annotations

import itertools
import math
import time

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from graphopt.errors import ClosedError, QueueFullError
from graphopt.runtime.serving.queue import Queue, Request


class QueueMachine(RuleBasedStateMachine):
    """A line is a list; whoever is among the first `capacity` is in the room."""

    @initialize(capacity=st.integers(1, 5))
    def start(self, capacity: int) -> None:
        self.queue = Queue(capacity)
        self.capacity = capacity
        self.line: list[Request] = []
        self.left: set[int] = set()
        self.been_in: set[int] = set()
        self.numbers = itertools.count()
        self.number: dict[int, int] = {}
        self.closed = False

    def _move(self) -> None:
        self.been_in |= {id(r) for r in self.line[: self.capacity]}

    def _drop_late(self) -> list[Request]:
        late = [r for r in self.line if r.deadline < math.inf]
        self.line = [r for r in self.line if r.deadline == math.inf]
        self.left |= {id(r) for r in late}
        return late

    @rule(wait=st.booleans(), late=st.booleans())
    def put(self, wait: bool, late: bool) -> None:
        now = time.perf_counter()
        request = Request([torch.zeros(())], now, now - 1 if late else math.inf)
        # Kept so that no two requests of a run have the same id.
        self.number[id(request)] = next(self.numbers)
        self.kept = [*getattr(self, "kept", []), request]
        if self.closed:
            with pytest.raises(ClosedError):
                self.queue.put(request, wait)
            return
        dropped = self._drop_late() if len(self.line) >= self.capacity else []
        if len(self.line) >= self.capacity and not wait:
            with pytest.raises(QueueFullError):
                self.queue.put(request, wait)
            self.pending = [*getattr(self, "pending", []), *dropped]
        else:
            waits = len(self.line) >= self.capacity
            self.line.append(request)
            assert set(self.queue.put(request, wait)) == {*self._pending(), *dropped}
            assert (request.admitted is not None) == waits
        self._move()

    def _pending(self) -> list[Request]:
        """Those past their deadline that a refused `put` has met; the next caller gets them."""
        pending, self.pending = getattr(self, "pending", []), []
        return pending

    @precondition(lambda self: self.line or self.closed or getattr(self, "pending", []))
    @rule(limit=st.integers(1, 6))
    def take(self, limit: int) -> None:
        if not self.line and not self.closed:
            return  # it would wait
        expected: list[Request] = []
        late: list[Request] = []
        while self.line and len(expected) < limit:
            request = self.line.pop(0)
            (expected if request.deadline == math.inf else late).append(request)
            self.left.add(id(request))
        taken, expired = self.queue.take(limit)
        assert taken == expected
        assert set(expired) == {*self._pending(), *late}
        assert all(request.future.running() for request in taken)
        self._move()

    @precondition(lambda self: self.line)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        request = self.line.pop(data.draw(st.integers(0, len(self.line) - 1)))
        assert request.future.cancel()
        self.queue.discard(request)
        self.left.add(id(request))
        self._move()

    @rule()
    def close(self) -> None:
        self.queue.close()
        self.closed = True

    @rule()
    def clear(self) -> None:
        found = self.queue.clear()
        assert set(found) == {*self._pending(), *self.line}
        assert [r for r in found if r in self.line] == self.line
        self.left |= {id(r) for r in self.line}
        self.line = []

    @invariant()
    def those_at_the_door_know_when_they_are_in(self) -> None:
        if not hasattr(self, "queue"):
            return
        assert len(self.queue) == len(self.line)
        for request in getattr(self, "kept", []):
            if request.admitted is not None:
                known = id(request) in self.been_in | self.left
                assert request.admitted.is_set() == known


QueueMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestQueue = QueueMachine.TestCase
