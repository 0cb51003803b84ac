"""Many callers at once, who cancel, are late, overflow and send what raises."""

from __future__ import annotations

import asyncio
import random
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.errors import ClosedError, DeadlineError, QueueFullError
from graphopt.runtime.serving import Dispatcher, Stats
from tests.serving.gated import PATIENCE, Gated, is_answer, row

FATES = ("answered", "failed", "expired", "cancelled", "abandoned", "refused")


@pytest.fixture(autouse=True)
def _switch_often() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def fate(caller: int, number: int, future: Future[object]) -> str:
    """What became of a request; that its answer is its own is asserted here."""
    try:
        assert is_answer(future.result(PATIENCE), caller, number)
    except CancelledError:
        return "cancelled"
    except DeadlineError:
        return "expired"
    except ClosedError:
        return "abandoned"
    except ValueError as error:
        return "failed" if str(error) == f"{caller} cannot be computed" else "another's error"
    return "answered"


class Caller(threading.Thread):
    """Sends requests in random ways, and keeps what became of each."""

    def __init__(self, name: int, requests: int, seed: int, dispatcher: Dispatcher) -> None:
        super().__init__()
        self.caller, self.requests, self.dispatcher = name, requests, dispatcher
        self.random = random.Random(f"{seed} {name}")
        self.fates: dict[int, str] = {}
        self.poisoned = 0
        self.closed = False
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self._send()
        except BaseException as error:
            self.error = error

    def _send(self) -> None:
        sent: list[tuple[int, Future[object]]] = []
        for number in range(self.requests):
            how = self.random.choice(("plain",) * 5 + ("cancel", "late", "wait", "sync", "poison"))
            value = -1 if how == "poison" else number
            try:
                if how == "sync":
                    answer = self.dispatcher(row(self.caller, number))
                    assert is_answer(answer, self.caller, number)
                    self.fates[number] = "answered"
                    continue
                future = self.dispatcher.submit(
                    row(self.caller, value),
                    timeout=0.0 if how == "late" else None,
                    wait=how in ("wait", "poison"),
                )
            except QueueFullError:
                self.fates[number] = "refused"
                continue
            except ClosedError:
                self.closed = True
                return
            finally:
                self.poisoned += how == "poison"
            sent.append((number, future))
            if how == "cancel" and future.cancel():
                self.fates[number] = "cancelled"
            if self.random.random() < 0.1:
                for number_, future_ in sent:
                    self.fates[number_] = fate(self.caller, number_, future_)
                sent.clear()
        self.sent = sent

    def finish(self) -> None:
        self.join(PATIENCE)
        assert not self.is_alive()
        assert self.error is None, self.error
        for number, future in getattr(self, "sent", []):
            self.fates[number] = fate(self.caller, number, future)


def check(model: Gated, callers: list[Caller], stats: Stats) -> None:
    """Nothing is lost, run in vain, or computed out of a caller's order."""
    fates = Counter(fate for caller in callers for fate in caller.fates.values())
    counted = {name: getattr(stats, name) for name in FATES}
    assert {name: fates[name] for name in FATES} == counted
    assert stats.under_way == 0
    assert stats.latency.count == stats.answered
    seen: dict[int, list[int]] = {}
    for caller, number in model.first_seen():
        seen.setdefault(caller, []).append(number)
    for caller in callers:
        numbers = [n for n in seen.get(caller.caller, []) if n != -1]
        assert numbers == sorted(numbers)
        never = {n for n, f in caller.fates.items() if f in ("cancelled", "refused", "abandoned")}
        # Here the only deadlines are those that are over at once, so late requests do not run.
        never |= {n for n, f in caller.fates.items() if f == "expired"}
        assert not never & set(numbers)
        answered = {n for n, f in caller.fates.items() if f == "answered"}
        assert answered <= set(numbers)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    callers=st.integers(1, 12),
    requests=st.integers(1, 40),
    sizes=st.sets(st.integers(1, 9), min_size=1),
    room=st.integers(0, 8),
)
def test_threads(seed: int, callers: int, requests: int, sizes: set[int], room: int) -> None:
    model = Gated()
    with model.serve(sizes=sorted(sizes), capacity=max(sizes) + room) as dispatcher:
        threads = [Caller(i, requests, seed, dispatcher) for i in range(callers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.finish()
            assert len(thread.fates) == requests
    check(model, threads, dispatcher.stats())


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32), after=st.floats(0, 0.01), drain=st.booleans())
def test_shutdown_under_load(seed: int, after: float, drain: bool) -> None:
    model = Gated()
    dispatcher = model.serve(sizes=(1, 4), capacity=6)
    threads = [Caller(i, 10_000, seed, dispatcher) for i in range(6)]
    for thread in threads:
        thread.start()
    threading.Event().wait(after)
    dispatcher.close(drain=drain)
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive()
        assert thread.error is None or (not drain and isinstance(thread.error, ClosedError))
        assert thread.closed or thread.error is not None
    stats = dispatcher.stats()
    assert stats.under_way == 0
    assert stats.abandoned == 0 or not drain


def test_two_hundred_threads() -> None:
    model = Gated()
    with model.serve(sizes=(1, 2, 4, 8, 16, 32)) as dispatcher:
        threads = [Caller(i, 20, 0, dispatcher) for i in range(200)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.finish()
    check(model, threads, dispatcher.stats())


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32), tasks=st.integers(1, 60), room=st.integers(0, 8))
def test_tasks(seed: int, tasks: int, room: int) -> None:
    """asyncio: some tasks are cancelled at any time, some have deadlines; the rest is answered."""
    model = Gated()
    chance = random.Random(seed)

    async def one(dispatcher: Dispatcher, caller: int, timeout: float | None) -> str:
        for number in range(5):
            try:
                answer = await dispatcher.acall(row(caller, number), timeout=timeout, wait=True)
            except DeadlineError:
                assert timeout is not None
                return "expired"
            assert is_answer(answer, caller, number)
        return "answered"

    async def together() -> list[str | BaseException]:
        async with model.serve(sizes=(1, 2, 4), capacity=4 + room) as dispatcher:
            running = [
                asyncio.create_task(one(dispatcher, i, chance.choice((None, None, 1e-4))))
                for i in range(tasks)
            ]
            for task in chance.sample(running, tasks // 4):
                await asyncio.sleep(0)
                task.cancel()
            found = await asyncio.gather(*running, return_exceptions=True)
            while len(dispatcher):  # those that were taken back have left
                await asyncio.sleep(0)
        stats = dispatcher.stats()
        assert stats.under_way == 0
        assert stats.accepted == stats.answered + stats.cancelled + stats.expired
        return found

    for found in asyncio.run(together()):
        assert found in ("answered", "expired") or isinstance(found, asyncio.CancelledError)
    for caller in range(tasks):
        numbers = [n for c, n in model.first_seen() if c == caller]
        assert numbers == list(range(len(numbers)))
