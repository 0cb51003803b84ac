"""The bounded queue between callers and the thread that computes.

Requests stand in one line, first come, first served. The first `capacity` of them are *in the
room*; behind them, *at the door*, wait those whose callers rather wait than be refused. A request
that is taken back leaves the line at once and makes room. Those past their deadline leave when the
line is next looked at for room or for a batch: there is no timer.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from torch import Tensor

from graphopt.errors import ClosedError, DeadlineError, QueueFullError


@dataclass(eq=False)
class Request:
    """One request.

    Attributes:
        rows: its tensors, without a batch dimension.
        entered: when it came; seconds of `time.perf_counter`.
        deadline: when its answer is due at the latest, on the same clock.
        future: gets the answer or the error.
        admitted: set when a request that waits at the door comes into the room, or never will.
    """

    rows: Sequence[Tensor]
    entered: float
    deadline: float
    future: Future[object] = field(default_factory=Future)
    admitted: threading.Event | None = None

    def late(self) -> DeadlineError:
        """The error of this request where it is past its deadline."""
        return DeadlineError(
            f"the request was not answered within {1e3 * (self.deadline - self.entered):.3g} ms",
            hint="allow more time, or send fewer requests at once",
        )


class Queue:
    """A bounded queue of requests, safe for any number of threads.

    Args:
        capacity: requests in the room.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._room: OrderedDict[Request, None] = OrderedDict()
        self._door: OrderedDict[Request, None] = OrderedDict()
        self._expired: list[Request] = []
        self._closed = False
        # Guards all of the above. No callback runs while it is held.
        self._changed = threading.Condition(threading.Lock())

    def put(self, request: Request, wait: bool) -> list[Request]:
        """Let a request in, or have it wait at the door; never blocks.

        Returns:
            Requests that made room as they are past their deadline; the caller fails them.

        Raises:
            QueueFullError: there is no room, and `wait` is false.
            ClosedError: the queue is closed.
        """
        with self._changed:
            if self._closed:
                raise ClosedError(
                    "the dispatcher is closed", hint="send requests before close() only"
                )
            if self._full():
                self._expire()
            if not self._full():
                self._room[request] = None
                self._changed.notify()
            elif wait:
                request.admitted = threading.Event()
                self._door[request] = None
            else:
                raise QueueFullError(
                    f"{len(self._room)} requests are waiting, which is all that the queue holds",
                    hint="send it again later, wait for room with wait=True, or serve with a "
                    "larger capacity",
                )
            return self._take_expired()

    def take(self, limit: int) -> tuple[list[Request], list[Request]]:
        """The next requests, as soon as there is one: up to `limit`, in order.

        The requests are marked as running, so they cannot be taken back any more.

        Returns:
            The requests, and those met on the way that are past their deadline, which the caller
            fails. Both are empty only at the end: the queue is closed and drained.
        """
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._room or self._closed)
                taken: list[Request] = []
                ended = not self._room
                now = time.perf_counter()
                while self._room and len(taken) < limit:
                    request, _ = self._room.popitem(last=False)
                    if request.deadline <= now:
                        self._expired.append(request)
                    elif request.future.set_running_or_notify_cancel():
                        taken.append(request)
                    self._admit()
                if taken or self._expired or ended:
                    return taken, self._take_expired()

    def discard(self, request: Request) -> None:
        """Let a request leave the line, if it is in it."""
        with self._changed:
            self._room.pop(request, None)
            self._door.pop(request, None)
            self._admit()
        if request.admitted is not None:
            request.admitted.set()

    def close(self) -> None:
        """Let no more requests in; `take` empties what there is."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def clear(self) -> list[Request]:
        """Everything in the line, which is empty then; the caller fails it."""
        with self._changed:
            left = [*self._expired, *self._room, *self._door]
            self._expired.clear()
            self._room.clear()
            self._door.clear()
            self._changed.notify_all()
        for request in left:
            if request.admitted is not None:
                request.admitted.set()
        return left

    def __len__(self) -> int:
        """Requests in the line, those at the door included."""
        with self._changed:
            return len(self._room) + len(self._door)

    def _full(self) -> bool:
        # Where somebody is at the door, the room is full.
        return len(self._room) >= self.capacity

    def _admit(self) -> None:
        """Fill the room from the door."""
        while self._door and len(self._room) < self.capacity:
            request, _ = self._door.popitem(last=False)
            self._room[request] = None
            assert request.admitted is not None
            request.admitted.set()
            self._changed.notify_all()

    def _expire(self) -> None:
        now = time.perf_counter()
        for line in (self._room, self._door):
            late = [request for request in line if request.deadline <= now]
            for request in late:
                del line[request]
                if request.admitted is not None:
                    request.admitted.set()
            self._expired += late
        self._admit()

    def _take_expired(self) -> list[Request]:
        expired, self._expired = self._expired, []
        return expired
