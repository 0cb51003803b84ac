"""A thread that looks after waits: one that takes long is told of before it fails.

It also answers for this rank when another one has failed and asks who is still there, as a rank
that waits within torch cannot. A step only says where it waits, which is one assignment; the thread
looks about once a second, and asks the store only when a wait takes longer than that.
"""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field

from graphopt.runtime.ranks.agreement import FRACTION, Agreement, ranks
from graphopt.runtime.ranks.store import StoreLost

# Seconds after which a wait is told of at the latest.
LATEST = 60.0
# Looks without any wait after which the thread ends; the next wait starts another one.
IDLE = 60

log = logging.getLogger("graphopt")


@dataclass(eq=False, slots=True)
class Wait:
    """A wait for other ranks.

    Attributes:
        what: is lost if it fails, as a sentence.
        topic: equal on all ranks that wait at the same place.
        begun: since when.
    """

    what: Callable[[], str]
    topic: str
    begun: float = field(default_factory=time.monotonic)


class Watch:
    """Looks after the waits of one model.

    Args:
        agreement: how ranks talk.

    Attributes:
        wait: what this rank waits for now.
    """

    def __init__(self, agreement: Agreement) -> None:
        timeout = agreement.timeout.total_seconds()
        self.agreement = agreement
        self.tick = min(1.0, timeout / 16)
        self.after = min(LATEST, FRACTION * timeout)
        self._missing: dict[str, list[int]] = {}
        self._wait: Wait | None = None
        self._told: Wait | None = None
        self._noted: Wait | None = None
        self._thread: threading.Thread | None = None
        self._waits = self._seen = self._idle = 0

    @property
    def wait(self) -> Wait | None:
        """What this rank waits for now."""
        return self._wait

    @wait.setter
    def wait(self, wait: Wait | None) -> None:
        self._wait = wait
        self._waits += 1
        if self._thread is None and self.agreement.size > 1:
            self._thread = threading.Thread(
                target=_look_on, args=(weakref.ref(self), self.tick), daemon=True
            )
            self._thread.start()

    def missing(self, topic: str) -> list[int]:
        """Ranks that another one has found to be missing, as far as this one has heard."""
        return self._missing.get(topic, [])

    def rests(self) -> bool:
        """Whether there has been no wait for so long that the thread is to end."""
        self._idle = self._idle + 1 if self._waits == self._seen and self._wait is None else 0
        self._seen = self._waits
        if self._idle < IDLE:
            return False
        self._thread, self._idle = None, 0
        return True

    def look(self) -> None:
        """See whether this rank waits for long, and say so to the others and to the user."""
        wait, noted = self._wait, self._noted
        if noted is not None and noted is not wait:
            self._noted = None
            self.agreement.store.delete(f"{noted.topic}/waits/{self.agreement.rank}")
        if wait is None or time.monotonic() - wait.begun < 2 * self.tick:
            return
        agreement, topic = self.agreement, wait.topic
        store, rank = agreement.store, agreement.rank
        if store.has(f"{topic}/missing"):
            self._missing[topic] = [int(r) for r in store.get(f"{topic}/missing").split()]
        waited = time.monotonic() - wait.begun
        if waited < self.after and not store.has(f"{topic}/any"):
            return
        if self._noted is not wait:
            self._noted = wait
            store.set(f"{topic}/waits/{rank}", wait.what())
            return  # others may be about to say the same
        if self._told is not wait and waited >= self.after:
            self._told = wait
            here = [r for r in range(agreement.size) if store.has(f"{topic}/waits/{r}")]
            absent = [r for r in range(agreement.size) if r not in here]
            if here and here[0] == rank and absent:
                left = agreement.timeout.total_seconds() - waited
                log.warning(
                    "rank %d has waited %.1f s for %s, which %s not sent; an error follows in "
                    "%.0f s: %s",
                    rank,
                    waited,
                    ranks(absent),
                    "have" if len(absent) > 1 else "has",
                    left,
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
