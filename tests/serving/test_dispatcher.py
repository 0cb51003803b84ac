"""The rule, and what becomes of requests that cannot or need not be answered."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import pytest
import torch
from torch import Tensor

from graphopt.errors import (
    ArgumentError,
    ClosedError,
    DeadlineError,
    QueueFullError,
    RequestError,
    ServingError,
)
from graphopt.runtime.serving import Dispatcher
from tests.serving.gated import PATIENCE, Gated, is_answer, row


def _numbers(batch: list[tuple[int, int]]) -> list[int]:
    return [number for _, number in batch]


def test_a_batch_is_what_came_while_the_last_one_ran() -> None:
    model = Gated()
    with model.serve() as dispatcher:
        with model.busy(dispatcher):
            five = [dispatcher.submit(row(1, i)) for i in range(5)]
        assert all(is_answer(f.result(PATIENCE), 1, i) for i, f in enumerate(five))
        assert model.batches[0] == [(99, 0)]
        # Padded to the next size with copies of the first row.
        assert _numbers(model.batches[1]) == [0, 1, 2, 3, 4, 0, 0, 0]
        assert len(model.batches) == 2
        assert dispatcher.stats().batches == {1: 1, 8: 1}
        assert dispatcher.stats().padding == 3


def test_more_than_the_largest_batch_makes_several_in_order() -> None:
    model = Gated()
    with model.serve(sizes=(4, 1)) as dispatcher:
        with model.busy(dispatcher):
            futures = [dispatcher.submit(row(1, i)) for i in range(9)]
        assert all(is_answer(f.result(PATIENCE), 1, i) for i, f in enumerate(futures))
    assert [_numbers(batch) for batch in model.batches[1:]] == [[0, 1, 2, 3], [4, 5, 6, 7], [8]]


def test_a_lone_request_starts_at_once() -> None:
    model = Gated()
    with model.serve() as dispatcher:
        for i in range(3):
            assert is_answer(dispatcher(row(0, i)), 0, i)
    assert model.batches == [[(0, 0)], [(0, 1)], [(0, 2)]]


@pytest.mark.parametrize("bad", [[0], [7], [3, 4], list(range(8))])
def test_what_raises_fails_alone(bad: list[int]) -> None:
    model = Gated()
    with model.serve() as dispatcher:
        with model.busy(dispatcher):
            futures = [dispatcher.submit(row(i, -1 if i in bad else i)) for i in range(8)]
            ended: list[int] = []
            for i, future in enumerate(futures):
                future.add_done_callback(lambda _, i=i: ended.append(i))
        for i, future in enumerate(futures):
            if i in bad:
                with pytest.raises(ValueError, match=f"^{i} cannot be computed$"):
                    future.result(PATIENCE)
            else:
                assert is_answer(future.result(PATIENCE), i, i)
        stats = dispatcher.stats()
    assert ended == list(range(8))
    assert stats.failed == len(bad)
    # Halves, down to one: with one bad request three batches raise before it is alone.
    assert stats.retries == {1: 3, 2: 5, 8: 7}[len(bad)]


def test_what_has_another_form_is_refused_before_it_is_queued() -> None:
    model = Gated()
    with model.serve() as dispatcher:
        with model.busy(dispatcher):
            good = dispatcher.submit(row(1, 1))
            for bad in (torch.zeros(3), torch.zeros(2, dtype=torch.float64), 1.0, (row(1, 2),)):
                with pytest.raises(RequestError):
                    dispatcher.submit(bad)
        assert is_answer(good.result(PATIENCE), 1, 1)
        assert dispatcher.stats().accepted == 2
    assert dispatcher.stats().retries == 0


def test_overflow_is_an_error_to_that_caller_only() -> None:
    model = Gated()
    with model.serve(sizes=(1, 4), capacity=4) as dispatcher:
        with model.busy(dispatcher):
            futures = [dispatcher.submit(row(1, i)) for i in range(4)]
            with pytest.raises(QueueFullError, match="4 requests are waiting"):
                dispatcher.submit(row(2, 0))
            with pytest.raises(QueueFullError):
                dispatcher(row(2, 0))
            with pytest.raises(QueueFullError):
                asyncio.run(dispatcher.acall(row(2, 0)))
        assert all(is_answer(f.result(PATIENCE), 1, i) for i, f in enumerate(futures))
        assert is_answer(dispatcher(row(2, 1)), 2, 1)
        assert dispatcher.stats().refused == 3
    assert (2, 0) not in model.first_seen()


def test_who_waits_for_room_gets_in_in_order() -> None:
    model = Gated()
    with model.serve(sizes=(1, 2), capacity=2) as dispatcher, ThreadPoolExecutor(8) as pool:
        with model.busy(dispatcher):
            for i in range(2):
                dispatcher.submit(row(1, i))
            waiting: list[Future[Future[object]]] = []
            for i in range(2, 8):
                waiting.append(pool.submit(dispatcher.submit, row(1, i), wait=True))
                while len(dispatcher) < i + 1:
                    threading.Event().wait(0.001)
            assert not any(future.done() for future in waiting)
            with pytest.raises(QueueFullError):  # nobody comes in before those who wait
                dispatcher.submit(row(1, 8))
        answers = [future.result(PATIENCE).result(PATIENCE) for future in waiting]
    assert all(is_answer(answer, 1, i) for i, answer in enumerate(answers, start=2))
    assert model.first_seen() == [(99, 0), *((1, i) for i in range(8))]


def test_cancelled_requests_never_run_and_make_room() -> None:
    model = Gated()
    with model.serve(sizes=(1, 4), capacity=4) as dispatcher:
        with model.busy(dispatcher):
            futures = [dispatcher.submit(row(1, i)) for i in range(4)]
            assert futures[1].cancel()
            assert futures[2].cancel()
            assert len(dispatcher) == 2
            later = dispatcher.submit(row(1, 4))
        assert is_answer(later.result(PATIENCE), 1, 4)
        assert futures[0].done()
        assert dispatcher.stats().cancelled == 2
    assert model.batches[1:] == [[(1, 0), (1, 3), (1, 4), (1, 0)]]


def test_what_runs_cannot_be_cancelled() -> None:
    model = Gated()
    with model.serve() as dispatcher:
        with model.busy(dispatcher):
            first = dispatcher.submit(row(1, 0))
        first.result(PATIENCE)
        assert not first.cancel()


def test_expired_requests_never_run() -> None:
    model = Gated()
    with model.serve() as dispatcher:
        with model.busy(dispatcher):
            late = dispatcher.submit(row(1, 0), timeout=0.0)
            good = dispatcher.submit(row(1, 1), timeout=PATIENCE)
            # Waiting ends at the deadline, not when the batch under way ends.
            with pytest.raises(DeadlineError, match="within 1 ms"):
                dispatcher(row(1, 2), timeout=0.001)
            with pytest.raises(DeadlineError):
                asyncio.run(dispatcher.acall(row(1, 3), timeout=0.001))
            assert len(dispatcher) == 2  # who waited has left already
        with pytest.raises(DeadlineError) as raised:
            late.result(PATIENCE)
        assert isinstance(raised.value, TimeoutError)
        assert is_answer(good.result(PATIENCE), 1, 1)
        assert dispatcher.stats().expired == 3
    assert model.first_seen() == [(99, 0), (1, 1)]


def test_expired_requests_make_room() -> None:
    model = Gated()
    with model.serve(sizes=(1,), capacity=1) as dispatcher:
        with model.busy(dispatcher):
            late = dispatcher.submit(row(1, 0), timeout=0.0)
            good = dispatcher.submit(row(1, 1))
            with pytest.raises(DeadlineError):  # already, as its room was needed
                late.result(0)
            with pytest.raises(DeadlineError):
                dispatcher.submit(row(1, 2), wait=True, timeout=0.001)
        assert is_answer(good.result(PATIENCE), 1, 1)
    assert model.first_seen() == [(99, 0), (1, 1)]


def test_an_answer_that_is_late_is_an_error() -> None:
    def slow(x: Tensor) -> Tensor:
        threading.Event().wait(0.05)
        return x

    with Dispatcher(slow, row(0, 0), sizes=(1,)) as dispatcher:
        future = dispatcher.submit(row(1, 0), timeout=0.02)
        with pytest.raises(DeadlineError):
            future.result(PATIENCE)
        assert dispatcher.stats().expired == 1


def test_a_cancelled_task_takes_its_request_back() -> None:
    model = Gated()

    async def cancel(dispatcher: Dispatcher) -> None:
        task = asyncio.create_task(dispatcher.acall(row(1, 0)))
        while len(dispatcher) == 0:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert len(dispatcher) == 0

    with model.serve() as dispatcher:
        with model.busy(dispatcher):
            asyncio.run(cancel(dispatcher))
        assert dispatcher.stats().cancelled == 1
    assert model.first_seen() == [(99, 0)]


def test_the_models_own_errors_come_as_they_are() -> None:
    error: BaseException = RuntimeError()

    def run(x: Tensor) -> Tensor:
        if x[0, 0] == 1:
            raise error
        return x

    with Dispatcher(run, row(0, 0), sizes=(1,)) as dispatcher:
        for error in (TimeoutError("mine"), KeyError("mine")):
            with pytest.raises(type(error), match="mine") as raised:
                dispatcher(row(1, 0), timeout=PATIENCE)
            assert raised.value is error
        for error in (SystemExit(3), asyncio.CancelledError()):  # noqa: B007  (`run` raises it)
            with pytest.raises(ServingError, match="the model raised"):
                dispatcher(row(1, 0))
            with pytest.raises(ServingError, match="the model raised"):
                asyncio.run(dispatcher.acall(row(1, 0)))
        assert torch.equal(dispatcher(row(2, 2)), row(2, 2))


def test_a_callback_that_raises_stops_nobody() -> None:
    model = Gated()

    def leave(future: Future[object]) -> None:
        raise SystemExit

    with model.serve() as dispatcher:
        with model.busy(dispatcher):
            futures = [dispatcher.submit(row(1, i)) for i in range(3)]
            futures[0].add_done_callback(leave)
        assert all(is_answer(f.result(PATIENCE), 1, i) for i, f in enumerate(futures))
        assert is_answer(dispatcher(row(1, 3)), 1, 3)


def test_the_thread_that_computes_cannot_wait_for_itself() -> None:
    caught: list[Exception] = []

    def ask(future: Future[object]) -> None:
        for way in (dispatcher, partial(dispatcher.submit, wait=True)):
            try:
                way(row(1, 1))
            except ServingError as error:
                caught.append(error)

    model = Gated()
    with model.serve() as dispatcher:
        with model.busy(dispatcher):
            dispatcher.submit(row(1, 0)).add_done_callback(ask)
        dispatcher(row(1, 2))
    assert ["cannot wait" in str(error) for error in caught] == [True, True]
    assert model.first_seen() == [(99, 0), (1, 0), (1, 2)]


def test_close_drains() -> None:
    model = Gated()
    dispatcher = model.serve(sizes=(1, 2), capacity=2)
    with ThreadPoolExecutor(4) as pool:
        with model.busy(dispatcher):
            futures = [dispatcher.submit(row(1, i)) for i in range(2)]
            at_the_door = pool.submit(dispatcher, row(1, 2), wait=True)
            while len(dispatcher) < 3:
                threading.Event().wait(0.001)
            closing = pool.submit(dispatcher.close)
            while not dispatcher._queue._closed:
                threading.Event().wait(0.001)
            with pytest.raises(ClosedError):
                dispatcher.submit(row(1, 3))
            assert not closing.done()
        closing.result(PATIENCE)
        assert all(is_answer(f.result(0), 1, i) for i, f in enumerate(futures))
        assert is_answer(at_the_door.result(PATIENCE), 1, 2)
    with pytest.raises(ClosedError):
        dispatcher(row(1, 3))
    dispatcher.close()  # again: nothing
    assert dispatcher.stats().under_way == 0


def test_close_without_draining_leaves_nobody_waiting() -> None:
    model = Gated()
    dispatcher = model.serve(sizes=(1, 2), capacity=2)
    with ThreadPoolExecutor(4) as pool:
        with model.busy(dispatcher):
            futures = [dispatcher.submit(row(1, i)) for i in range(2)]
            futures.append(pool.submit(dispatcher, row(1, 2), wait=True))
            while len(dispatcher) < 3:
                threading.Event().wait(0.001)
            closing = pool.submit(dispatcher.close, drain=False)
            for future in futures:
                with pytest.raises(ClosedError, match="before it came to the request"):
                    future.result(PATIENCE)
        closing.result(PATIENCE)
    assert dispatcher.stats().abandoned == 3
    assert model.first_seen() == [(99, 0)]


def test_a_callback_may_close() -> None:
    model = Gated()
    dispatcher = model.serve()
    with model.busy(dispatcher):
        first = dispatcher.submit(row(1, 0))
        first.add_done_callback(lambda _: dispatcher.close())
        second = dispatcher.submit(row(1, 1))
    assert is_answer(second.result(PATIENCE), 1, 1)
    dispatcher.close()


def test_structures_go_in_and_come_out() -> None:
    def run(x: Tensor, *, scale: Tensor) -> dict[str, object]:
        return {"y": x * scale[:, None], "both": (x, scale), "kind": "scaled"}

    example = {"x": torch.ones(3), "scale": torch.tensor(2.0)}
    with Dispatcher(run, example, sizes=(1, 2)) as dispatcher:
        found = dispatcher({"scale": torch.tensor(3.0), "x": torch.arange(3.0)})
        assert isinstance(found, dict)
        assert found["kind"] == "scaled"
        assert found["y"].tolist() == [0.0, 3.0, 6.0]
        assert found["both"][1].item() == 3.0
        with pytest.raises(RequestError, match=r"another arrangement.*input 'scale', input 'x'"):
            dispatcher({"x": torch.ones(3)})


def test_answers_share_no_memory() -> None:
    model = Gated()
    with model.serve() as dispatcher:
        with model.busy(dispatcher):
            futures = [dispatcher.submit(row(1, i)) for i in range(2)]
        one, two = (future.result(PATIENCE) for future in futures)
    assert isinstance(one, Tensor)
    assert isinstance(two, Tensor)
    assert one.untyped_storage().data_ptr() != two.untyped_storage().data_ptr()
    assert one.untyped_storage().nbytes() == one.nbytes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sizes": ()}, r"sizes=\(\) are not batch sizes"),
        ({"sizes": (0, 1)}, r"sizes=\(0, 1\) are not batch sizes"),
        ({"sizes": 4}, "sizes=4 are not batch sizes"),
        ({"sizes": (8,), "capacity": 4}, "capacity=4 is less than the largest batch, 8"),
        ({"example": (row(0, 0), 3)}, "input 1 of the example is a int"),
        ({"example": ()}, "holds no tensor"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], message: str) -> None:
    given: dict[str, object] = {"example": row(0, 0), "sizes": (1,), **arguments}
    with pytest.raises(ArgumentError, match=message):
        Dispatcher(Gated(), **given)  # type: ignore[arg-type]


def test_bad_timeouts() -> None:
    with Gated().serve() as dispatcher, pytest.raises(ArgumentError, match="no time to wait"):
        dispatcher(row(0, 0), timeout=float("nan"))


def test_outputs_that_cannot_be_divided() -> None:
    with pytest.raises(ServingError, match=r"output 0 has shape \(\) for a batch of 1"):
        Dispatcher(lambda x: x.sum(), row(0, 0), sizes=(1,))
    before = threading.active_count()
    with pytest.raises(ZeroDivisionError):
        Dispatcher(lambda x: 1 / 0, row(0, 0), sizes=(1,))
    assert threading.active_count() == before
