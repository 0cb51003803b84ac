"""Batch Dispatch: the next batch starts when the last one ends, with whatever is queued.

Source: Amodei et al., "Deep Speech 2", arXiv 1512.02595 (deployment). There is no timer and no
target for the size of a batch. A lone request starts at once; under load, batches get as large as
what arrives while one is computed.
"""

from __future__ import annotations

import asyncio
import atexit
import functools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Self, TypeVar

import torch

from graphopt.errors import ArgumentError, ClosedError, ServingError
from graphopt.runtime.serving.batches import Form
from graphopt.runtime.serving.queue import Queue, Request
from graphopt.runtime.serving.runner import Runner, checked_sizes
from graphopt.runtime.serving.stats import Recorder, Stats

log = logging.getLogger("graphopt")

T = TypeVar("T")

# Enough for what a few largest batches take.
CAPACITY_IN_BATCHES = 8


class Dispatcher:
    """Answers concurrent requests by one thread that computes them in batches.

    Requests are computed in the order in which they came, and those of one caller are answered in
    that order. A batch has the smallest of `sizes` that holds it; missing rows are copies. An
    answer is bit-equal to that row of the model's own call on a batch of this size, whatever is in
    its other rows; this is tried on the example, at each size, before the first request.

    An error is that request's. What has not the form of the example is refused before it is
    queued. Where a batch raises, its halves are run, and their halves, down to the requests that
    raise alone: k of n make about ``2 k log2(n / k)`` runs more.

    The thread computes without gradients and outside of the caller's autocast. A request's tensors
    are read when its batch starts, so leave them alone until it is answered.

    Args:
        run: takes stacked arguments and returns tensors whose first dimension is the batch.
        example: one request without a batch dimension: a tensor, a tuple of positional arguments,
            or a dict of keyword arguments.
        sizes: of batches; each is one more kind of call.
        capacity: how many requests may be queued.
        device: where batches are computed; by default where requests are. Answers are where
            requests are.

    Raises:
        ArgumentError: an argument cannot be used.
        ServingError: answers would depend on what else is in their batch.
    """

    def __init__(
        self,
        run: Callable[..., object],
        example: object,
        *,
        sizes: Sequence[int],
        capacity: int | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.sizes = checked_sizes(sizes)
        self._most = self.sizes[-1]
        capacity = CAPACITY_IN_BATCHES * self._most if capacity is None else capacity
        if capacity < self._most:
            raise ArgumentError(
                f"capacity={capacity} is less than the largest batch, {self._most}",
                hint="a capacity of a few times that size",
            )
        self.form = Form.of(example)
        self._runner = Runner(run, self.form, self.sizes, device or self.form.device)
        self._example = self.form.rows(example)
        self._queue = Queue(capacity)
        self._recorder = Recorder()
        ready: Future[None] = Future()
        self._thread = threading.Thread(
            target=self._work, args=(ready,), name="graphopt-dispatcher", daemon=True
        )
        self._thread.start()
        try:
            ready.result()
        except BaseException:
            self._queue.close()
            raise
        # At exit, threads of callers have ended and torch is still there.
        atexit.register(self.close)

    def submit(
        self, request: object, *, timeout: float | None = None, wait: bool = False
    ) -> Future[object]:
        """Queue one request; its future gets the answer.

        Cancelling the future takes back a request that does not run yet. Callbacks of the future
        run in the dispatcher's thread and delay what comes next; those of a late request may run in
        the thread of a caller who needs its room.

        Args:
            request: of the form of the example.
            timeout: seconds within which the answer is due. A request that is late is not run; an
                answer that is late is an error.
            wait: whether to wait for room in the queue, if there is none, instead of raising.

        Raises:
            RequestError: it has another form.
            QueueFullError: there is no room.
            DeadlineError: there was no room in time.
            ClosedError: the dispatcher is closed.
        """
        if wait:
            self._may_wait()
        entered = self._enter(request, timeout, wait)
        if entered.admitted is not None:
            try:
                entered.admitted.wait(_left(entered))
            except BaseException:  # an interrupt of the thread that waits
                entered.future.cancel()
                raise
            if not entered.admitted.is_set() and entered.future.cancel():
                raise entered.late()
        return entered.future

    def __call__(
        self, request: object, *, timeout: float | None = None, wait: bool = False
    ) -> object:
        """The answer to one request, waiting for it; as `submit`, for threads."""
        self._may_wait()
        entered = self._enter(request, timeout, wait)
        future = entered.future
        try:
            return future.result(_left(entered))
        except TimeoutError:
            if future.done() and not future.cancelled():
                return future.result()  # the model's own error, or an answer just now
            future.cancel()
            raise entered.late() from None
        except BaseException:
            future.cancel()
            raise

    async def acall(
        self, request: object, *, timeout: float | None = None, wait: bool = False
    ) -> object:
        """The answer to one request, for asyncio; cancelling the task takes it back."""
        self._may_wait()
        entered = self._enter(request, timeout, wait)
        answer = asyncio.wrap_future(entered.future)
        try:
            done, _ = await asyncio.wait([answer], timeout=_left(entered))
        finally:
            # At once, where asyncio would take back the request one turn of its loop later.
            if not answer.done():
                entered.future.cancel()
                answer.cancel()
            elif not answer.cancelled():
                answer.exception()  # seen, where the task was cancelled at that moment, too
        if not done:
            raise entered.late()
        return answer.result()

    def close(self, *, drain: bool = True) -> None:
        """Take no more requests, and end. Returns when the thread has ended.

        Args:
            drain: answer what is queued, callers that wait for room included; otherwise these get
                a `ClosedError`, and only the batch under way is answered.
        """
        self._queue.close()
        if not drain:
            self._abandon()
        if threading.current_thread() is not self._thread:
            self._thread.join()
        atexit.unregister(self.close)

    async def aclose(self, *, drain: bool = True) -> None:
        """As `close`, for asyncio."""
        await asyncio.to_thread(functools.partial(self.close, drain=drain))

    def stats(self) -> Stats:
        """What became of the requests so far, and how long they took."""
        return self._recorder.stats()

    def __len__(self) -> int:
        """Requests that are queued or wait for room."""
        return len(self._queue)

    def __bool__(self) -> bool:
        """True, with an empty queue, too."""
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()

    def _enter(self, request: object, timeout: float | None, wait: bool) -> Request:
        if timeout is not None and not timeout >= 0:
            raise ArgumentError(f"timeout={timeout} is no time to wait", hint="seconds, or None")
        rows = self.form.rows(request)
        now = time.perf_counter()
        entered = Request(rows, now, float("inf") if timeout is None else now + timeout)
        self._recorder.count("accepted")
        try:
            expired = self._queue.put(entered, wait)
        except ServingError as error:
            self._recorder.count("accepted", -1)
            if not isinstance(error, ClosedError):
                self._recorder.count("refused")
            raise
        entered.future.add_done_callback(functools.partial(self._done, entered))
        self._fail_late(expired)
        return entered

    def _may_wait(self) -> None:
        if threading.current_thread() is self._thread:
            raise ServingError(
                "the dispatcher's own thread cannot wait for the dispatcher",
                hint="neither forward nor a callback of a future may wait for an answer",
            )

    def _done(self, request: Request, future: Future[object]) -> None:
        """A request that was taken back leaves the line; late ones are taken back by us."""
        if future.cancelled():
            self._queue.discard(request)
            late = request.deadline <= time.perf_counter()
            self._recorder.count("expired" if late else "cancelled")

    def _work(self, ready: Future[None]) -> None:
        with torch.no_grad():
            try:
                self._runner.rehearse(self._example)
            except BaseException as error:
                ready.set_exception(error)
                return
            ready.set_result(None)
            try:
                while (requests := self._next()) is not None:
                    if requests:
                        self._run(requests, time.perf_counter())
            finally:
                # Whatever ends the thread, no caller may wait for it.
                self._queue.close()
                self._abandon()

    def _next(self) -> list[Request] | None:
        """The requests of the next batch, which may be none; ``None`` at the end."""
        requests, expired = self._queue.take(self._most)
        self._fail_late(expired)
        return requests if requests or expired else None

    def _run(self, requests: Sequence[Request], started: float) -> None:
        """Answer requests in one batch; in halves where it raises."""
        self._recorder.batch(self._runner.size(len(requests)), len(requests))
        try:
            answers = self._runner([request.rows for request in requests])
        except BaseException as error:
            if len(requests) > 1:
                self._recorder.count("retries")
                half = len(requests) // 2
                self._run(requests[:half], started)
                self._run(requests[half:], started)
            else:
                self._recorder.count("failed")
                _settle(requests[0].future.set_exception, _ordinary(error))
            return
        for request, answer in zip(requests, answers, strict=True):
            ended = time.perf_counter()
            if ended > request.deadline:
                self._fail_late([request])
            else:
                self._recorder.answered(request.entered, started, ended)
                _settle(request.future.set_result, answer)

    def _fail_late(self, requests: Sequence[Request]) -> None:
        for request in requests:
            future = request.future
            # One that was queued until now may be taken back at this very moment.
            if future.running() or future.set_running_or_notify_cancel():
                self._recorder.count("expired")
                _settle(future.set_exception, request.late())

    def _abandon(self) -> None:
        for request in self._queue.clear():
            if request.future.set_running_or_notify_cancel():
                self._recorder.count("abandoned")
                error = ClosedError(
                    "the dispatcher ended before it came to the request",
                    hint="close() without drain=False answers what is queued",
                )
                _settle(request.future.set_exception, error)


def _settle(settle: Callable[[T], None], value: T) -> None:
    """Give a future its end; whatever its callbacks raise is theirs, and others are not left."""
    try:
        settle(value)
    except BaseException:
        log.exception("a callback of a request's future raised")


def _left(request: Request) -> float | None:
    """Seconds until the deadline; ``None`` without one."""
    if request.deadline == float("inf"):
        return None
    return max(0.0, request.deadline - time.perf_counter())


def _ordinary(error: BaseException) -> Exception:
    """An error that callers can get: one that ends threads or loops stays with the model."""
    if isinstance(error, Exception) and not isinstance(error, asyncio.CancelledError):
        return error
    wrapped = ServingError(f"the model raised {error!r}", hint="raise an Exception instead")
    wrapped.__cause__ = error
    return wrapped
