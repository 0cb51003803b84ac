"""Who waits for whom: notes that all ranks of a job can read, whatever groups they are in.

A rank of a mesh is in several groups, and a fault in one of them soon stalls the others. So a wait
that takes long is noted with the ranks that it is for, and whoever fails follows these notes to the
ranks that have none. Ranks are those of the job here, not of a group.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from graphopt.runtime.ranks.store import Store

# Seconds in which other ranks may note that they fail or wait, too, before one counts as lost.
GRACE = 3.0
# Seconds between two looks at the notes of others.
PAUSE = 0.05
# Seconds that a rank which knows the end stays, so that others can read it from the store.
FAREWELL = 1.5


@dataclass(frozen=True)
class Note:
    """What a rank says of itself.

    Attributes:
        failed: whether it has ended with an error, or else waits.
        on: the ranks that it waits for; of an error of its own none.
        what: it waits for, or has failed with.
        beat: grows as long as it waits and runs.
    """

    failed: bool
    on: tuple[int, ...]
    what: str
    beat: int = 0


@dataclass(frozen=True)
class Found:
    """What the notes say of a failure.

    Attributes:
        lost: ranks that neither wait nor have failed.
        behind: ranks that wait for these or have failed, as far as this one needs them.
        notes: of all ranks that have one.
    """

    lost: tuple[int, ...]
    behind: tuple[int, ...]
    notes: dict[int, Note]

    def culprits(self) -> list[int]:
        """Ranks that have failed without waiting for another one."""
        return sorted(r for r, note in self.notes.items() if note.failed and not note.on)


@dataclass
class Notes:
    """The notes of all ranks, and this rank's own.

    Args:
        store: that all ranks of the job see.
        rank: this one, within the job.
        size: how many ranks the job has.

    Attributes:
        alarm: whether any rank has failed, as far as this one has heard.
        verdict: ranks that another one has found to be lost.
        ended: when this rank has noted an error of its own, by `time.monotonic`; 0 if it has not.
    """

    store: Store
    rank: int
    size: int
    alarm: bool = False
    verdict: tuple[int, ...] = ()
    ended: float = 0.0
    _beat: int = 0
    _waits: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def waits(self, on: Sequence[int], what: str, still: Callable[[], bool] = lambda: True) -> None:
        """Note that this rank waits, or still does.

        Args:
            on: for which ranks.
            what: for what, as a sentence about its loss.
            still: whether it does, asked when nothing can come between.
        """
        with self._lock:
            if still():
                self._beat, self._waits = self._beat + 1, True
                self._write(Note(False, tuple(on), what, self._beat))

    def done(self) -> None:
        """The wait that was noted is over."""
        with self._lock:
            if self._waits:
                self._waits = False
                self.store.delete(f"notes/{self.rank}")

    def goes_on(self) -> None:
        """The error that was noted was not the end."""
        with self._lock:
            if self.ended:
                self.ended = 0.0
                self.store.delete(f"notes/{self.rank}")

    def failed(self, on: Sequence[int], what: str) -> None:
        """Note that this rank ends with an error; the others are told to look.

        Args:
            on: the ranks that it has waited for; none where the error is its own.
            what: the error.
        """
        with self._lock:
            self._waits, self.ended = False, time.monotonic()
            self._write(Note(True, tuple(on), what))
        self.store.set("notes/alarm", "failed", GRACE)

    def hear(self) -> None:
        """See whether another rank has failed, and what it has found."""
        if not self.alarm:
            self.alarm = self.store.has("notes/alarm", GRACE)
        if self.alarm and not self.verdict and self.store.has("notes/lost", GRACE):
            self.verdict = tuple(json.loads(self.store.get("notes/lost", GRACE)))

    def of(self, rank: int) -> Note | None:
        """What a rank says."""
        key = f"notes/{rank}"
        if not self.store.has(key, GRACE):
            return None
        failed, on, what, beat = json.loads(self.store.get(key, GRACE))
        return Note(failed, tuple(on), what, beat)

    def around(self, on: Sequence[int]) -> tuple[list[int], dict[int, Note]]:
        """Ranks without a note that these ranks wait for, themselves included; and the notes."""
        notes: dict[int, Note] = {}
        silent, queue = [], list(on)
        seen = {self.rank}
        for rank in queue:
            if rank in seen:
                continue
            seen.add(rank)
            note = self.of(rank)
            if note is None:
                silent.append(rank)
            else:
                notes[rank] = note
                queue += note.on
        return sorted(silent), notes

    def find(self, on: Sequence[int], grace: float = GRACE) -> Found:
        """Follow the notes from the ranks that this one has waited for.

        A rank that was lost while it waited has left its note, so only those count that are renewed
        meanwhile. The first rank to know publishes who is lost.

        Args:
            on: these ranks.
            grace: seconds for them to say something.

        Raises:
            StoreLost: the store is gone.
        """
        end = time.monotonic() + grace
        first: dict[int, int | None] = {}
        while True:
            self.hear()
            silent, notes = self.around(on)
            for rank in silent:
                first.setdefault(rank, None)
            for rank, note in notes.items():
                first.setdefault(rank, note.beat)
            alive = {r: n for r, n in notes.items() if n.failed or first[r] != n.beat}
            if self.verdict or len(alive) == len(first) or time.monotonic() > end:
                break
            time.sleep(PAUSE)
        lost = self.verdict or _unheard(on, alive, self.rank)
        if lost and not self.verdict:
            self.verdict = lost
            self.store.set("notes/lost", json.dumps(lost), GRACE)
        if lost:
            self.leave(f"notes/left/{lost}", self.size - len(lost))
        return Found(lost, tuple(sorted(r for r in alive if r not in lost)), alive)

    def leave(self, key: str, others: int) -> None:
        """Stay until the others have read what ends this, as the store may end with this process.

        Args:
            key: of what ends.
            others: how many ranks read it, this one included.
        """
        count = self.store.add(f"{key}/left")
        end = time.monotonic() + FAREWELL
        while self.rank == 0 and count < others and time.monotonic() < end:
            time.sleep(PAUSE)
            count = int(self.store.get(f"{key}/left"))

    def _write(self, note: Note) -> None:
        text = json.dumps([note.failed, note.on, note.what, note.beat])
        self.store.set(f"notes/{self.rank}", text, GRACE)


def _unheard(on: Sequence[int], alive: dict[int, Note], rank: int) -> tuple[int, ...]:
    """Ranks that are reached from these by notes of ranks that live, and have none themselves."""
    queue, seen = list(on), {rank}
    found = set()
    for other in queue:
        if other in seen:
            continue
        seen.add(other)
        if other in alive:
            queue += alive[other].on
        else:
            found.add(other)
    return tuple(sorted(found))
