"""A thread that looks after waits: one that takes long is noted and told of before it fails.

So it also answers for this rank when another one has failed and asks who is still there, as a rank
that waits within torch cannot. A step only says where it waits, which is one assignment; the thread
looks about once a second, and asks the store only when a wait takes longer than that.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable, Sequence

from graphopt.runtime.ranks.agreement import FRACTION, Agreement, ranks
from graphopt.runtime.ranks.store import StoreLost

# Seconds after which a wait is told of at the latest.
LATEST = 60.0
# Looks without any wait after which the thread ends; the next wait starts another one.
IDLE = 60

log = logging.getLogger("graphopt")


class Wait:
    """A wait for other ranks, which may begin again and again.

    Args:
        what: is lost if it fails, as a sentence.
        on: the ranks of the job that it is for.

    Attributes:
        begun: since when.
        over: whether it has ended.
    """

    __slots__ = ("begun", "on", "over", "what")

    def __init__(self, what: Callable[[], str], on: Sequence[int]) -> None:
        self.what, self.on = what, on
        self.begun = time.monotonic()
        self.over = False


class Watch:
    """Looks after the waits of one model.

    Args:
        agreement: how ranks talk.

    Attributes:
        wait: the newest wait of this rank; set by whoever waits.
        thread: that looks; `start` makes one.
    """

    def __init__(self, agreement: Agreement) -> None:
        timeout = agreement.timeout.total_seconds()
        self.agreement = agreement
        self.tick = min(1.0, timeout / 16)
        self.after = min(LATEST, FRACTION * timeout)
        self.wait: Wait | None = None
        self.thread: threading.Thread | None = None
        self._noted = self._told = self._seen = 0.0
        self._idle = 0

    def start(self) -> None:
        """Look at the waits of this rank from now on."""
        self.thread = threading.Thread(
            target=_look_on, args=(weakref.ref(self), self.tick), daemon=True
        )
        self.thread.start()

    def rests(self) -> bool:
        """Whether there has been no wait for so long that the thread is to end."""
        wait = self.wait
        begun = 0.0 if wait is None else wait.begun
        idle = begun == self._seen and (wait is None or wait.over)
        self._idle, self._seen = self._idle + 1 if idle else 0, begun
        if self._idle < IDLE:
            return False
        self.thread, self._idle = None, 0
        return True

    def look(self) -> None:
        """See whether this rank waits for long, and say so to the others and to the user."""
        wait, notes = self.wait, self.agreement.notes
        if wait is None:
            return
        begun = wait.begun
        if self._noted and (self._noted != begun or wait.over):
            self._noted = 0.0
            notes.done()
        if notes.ended and begun > notes.ended:
            notes.goes_on()
        waited = time.monotonic() - begun
        if wait.over or waited < 2 * self.tick:
            return
        notes.hear()
        if waited < self.after and not notes.alarm:
            return
        new = self._noted != begun
        self._noted = begun
        notes.waits(wait.on, wait.what(), lambda: wait.begun == begun and not wait.over)
        if not new and self._told != begun and waited >= self.after:
            self._told = begun
            self._tell(wait, waited)

    def _tell(self, wait: Wait, waited: float) -> None:
        """Say whom this rank waits for, if it is the lowest of those that do."""
        notes = self.agreement.notes
        absent, others = notes.around(wait.on)
        if not absent or any(rank < notes.rank for rank in others):
            return
        log.warning(
            "rank %d has waited %.1f s for %s, which %s not sent; an error follows in %.0f s: %s",
            notes.rank,
            waited,
            ranks(absent),
            "have" if len(absent) > 1 else "has",
            self.agreement.timeout.total_seconds() - waited,
            wait.what(),
        )


def _look_on(reference: weakref.ref[Watch], tick: float) -> None:
    """Look again and again, until the model is gone or rests, or the store does not answer."""
    while True:
        time.sleep(tick)
        watch = reference()
        if watch is None or watch.rests():
            return
        try:
            watch.look()
        except StoreLost:
            return
        del watch
