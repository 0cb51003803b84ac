"""Blame follows the notes of who waits for whom, to ranks that say nothing."""

from __future__ import annotations

import threading
import time

import pytest
from torch.distributed import HashStore

from graphopt.runtime.ranks.channel import _who
from graphopt.runtime.ranks.notes import Note, Notes
from graphopt.runtime.ranks.store import Store


def _job(size: int) -> list[Notes]:
    inner = HashStore()
    return [Notes(Store(inner, 5), rank, size) for rank in range(size)]


class _Living:
    """Within, these ranks renew the notes of their waits."""

    def __init__(self, *waits: tuple[Notes, list[int]]) -> None:
        self.waits, self.over = waits, threading.Event()

    def __enter__(self) -> None:
        self.thread = threading.Thread(target=self._renew)
        self.thread.start()
        time.sleep(0.05)

    def _renew(self) -> None:
        while not self.over.wait(0.03):
            for notes, on in self.waits:
                notes.waits(on, f"what rank {notes.rank} needs did not arrive")

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.thread.join()


def test_blame_goes_along_a_chain() -> None:
    first, second, third, _ = _job(4)
    with _Living((second, [2]), (third, [3])):
        first.failed([1], "a message did not arrive")
        found = first.find([1], 0.4)
        assert found.lost == (3,)
        assert _who([1], found) == "rank 3 did not answer, for which rank 1 waits"
    # The first to know tells all, so nobody looks again.
    begun = time.monotonic()
    second.failed([2], "a message did not arrive")
    assert second.find([2], 5).lost == (3,)
    assert time.monotonic() - begun < 1


def test_a_rank_that_is_lost_while_it_waits() -> None:
    first, second, third = _job(3)
    second.waits([2], "a message did not arrive")  # and is never renewed
    with _Living((third, [1])):
        found = first.find([1], 0.4)
    assert found.lost == (1,)
    assert _who([1], found) == "rank 1 did not answer"


def test_ranks_that_wait_for_each_other() -> None:
    first, second, _ = _job(3)
    with _Living((second, [0])):
        found = first.find([1], 0.4)
    assert not found.lost
    said = "rank 1 waits itself, or what rank 1 needs did not arrive"
    assert _who([1], found) == said
    assert _who([1, 2], found) == "no rank is missing"


def test_a_rank_with_an_error_of_its_own() -> None:
    first, second, third = _job(3)
    third.failed((), "ValueError('of its own')")
    with _Living((second, [2])):
        found = first.find([1], 0.4)
        first.hear()
    assert first.alarm
    assert _who([1], found) == "rank 2 had failed before: ValueError('of its own')"


def test_what_a_rank_leaves_behind() -> None:
    first, second = _job(2)
    first.waits([1], "a message")
    first.done()
    assert second.of(0) is None
    first.failed([1], "an error")
    first.done()  # the wait is over, the error is not
    first.waits([1], "a message", lambda: False)  # noted too late
    assert second.of(0) == Note(True, (1,), "an error")
    first.goes_on()
    assert second.of(0) is None


@pytest.mark.parametrize("silent", [(2,), (1, 2)])
def test_of_a_collective_all_that_say_nothing(silent: tuple[int, ...]) -> None:
    notes = _job(3)
    others = [1, 2]
    living = [(notes[r], [q for q in range(3) if q != r]) for r in others if r not in silent]
    with _Living(*living):
        assert notes[0].find(others, 0.4).lost == silent
