"""All ranks agree, or all of them raise; through the job's key-value store, never a collective.

A collective would hang where one rank does not take part, and that is what has to be found out.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta

from graphopt.errors import RankError
from graphopt.runtime.ranks.silent import refused
from graphopt.runtime.ranks.store import Store, StoreLost

# What is written as the verdict when all is well.
_EQUAL = "equal"

SAME_MODEL = "build the same model with the same passes on all ranks"
# How long one waits for others without a word.
PATIENCE = timedelta(seconds=20)
# A wait is told of after this part of the timeout, if that is sooner.
FRACTION = 0.25
# Seconds that a rank which knows the end stays, so that others can read it from the store.
FAREWELL = 1.5
LOOK = "look at the output of that rank"

log = logging.getLogger("graphopt")


@dataclass
class Agreement:
    """Compares texts of all ranks and spreads rank 0's decisions.

    Args:
        store: that all ranks see.
        rank, size: of this process, and their number.
        timeout: how long to wait for the others.
        silences: where ranks whose passes send nothing have said so.
    """

    store: Store
    rank: int
    size: int
    timeout: timedelta
    silences: Store | None = None
    _counts: dict[str, int] = field(default_factory=dict)

    def agree(
        self,
        topic: str,
        mine: str,
        decide: Callable[[], str] = str,
        hint: str = SAME_MODEL,
    ) -> str:
        """Rank 0's decision, once `mine` was found equal on all ranks.

        Each rank compares with rank 0 and the last one to come publishes the verdict, so the store
        carries as many messages as there are ranks.

        Raises:
            RankError: another rank has another text, a rank did not come in time, or the store is
                gone.
        """
        count = self._counts[topic] = self._counts.get(topic, 0) + 1
        key = f"{topic}/{count}"
        try:
            return self._agree(topic, key, mine, decide, hint)
        except StoreLost as error:
            raise self.lost(f"{topic} could not be agreed on", error) from error

    def _agree(self, topic: str, key: str, mine: str, decide: Callable[[], str], hint: str) -> str:
        store, whole = self.store, self.timeout.total_seconds()
        end = time.monotonic() + whole
        digest = hashlib.sha256(mine.encode()).hexdigest()
        if self.rank == 0:  # texts may be long, and others read them only where they differ
            store.set(f"{key}/text", mine)
            store.set(f"{key}/digest", digest)
        if digest != self._get(key, "digest", [0], end):
            difference = _difference(topic, self.rank, store.get(f"{key}/text"), mine)
            store.set(f"{key}/difference", difference)
        store.set(f"{key}/here/{self.rank}", "here")
        if store.add(f"{key}/arrived") == self.size:
            differs = store.has(f"{key}/difference")
            store.set(f"{key}/verdict", store.get(f"{key}/difference") if differs else _EQUAL)
        verdict = self._get(key, "verdict", range(self.size), end)
        if verdict != _EQUAL:
            self._leave(key, self.size)
            raise RankError(verdict, hint=hint)
        if self.rank == 0:
            store.set(f"{key}/decision", decide())
        return self._get(key, "decision", (), time.monotonic() + whole)

    def _get(self, key: str, what: str, needed: Sequence[int], end: float) -> str:
        """A text that others write; says once whom it waits for.

        Args:
            key: of the agreement.
            what: of it.
            needed: ranks that have to come before; none means that rank 0 has to decide.
            end: when it has to be there.
        """
        store, whole = self.store, self.timeout.total_seconds()
        keys = (f"{key}/{what}", f"{key}/failed")
        patience = min(PATIENCE.total_seconds(), FRACTION * whole)
        found = store.first(keys, patience, end)
        if found is None:
            log.warning("waiting for %s to agree on %s", self._whom(key, needed), key.split("/")[0])
            found = store.first(keys, max(end - time.monotonic(), 0.0), end)
        if found == keys[0]:
            return store.get(keys[0])
        if found is None:
            who = self._whom(key, needed)
            text = f"{who} did not come to agree on {key.split('/')[0]} within {whole:g} s"
            if self.silences is not None:
                text += refused(self.silences, self._absent(key, needed))
            store.set(f"{key}/failed", text)
        text = store.get(f"{key}/failed")
        self._leave(key, self.size - 1)
        raise RankError(
            text,
            hint="call the model on every rank, and look at the output of the missing one",
            restart=True,
        )

    def _whom(self, key: str, needed: Sequence[int]) -> str:
        if not needed:
            return ranks([0])
        absent = self._absent(key, needed)
        return ranks(absent) if absent else "another rank"

    def _absent(self, key: str, needed: Sequence[int]) -> list[int]:
        return [r for r in needed if not self.store.has(f"{key}/here/{r}")]

    def _leave(self, key: str, others: int) -> None:
        """Stay until the others have read what ends this, as the store may end with this process.

        Args:
            key: of what ends.
            others: how many ranks read it, this one included.
        """
        count = self.store.add(f"{key}/left")
        end = time.monotonic() + FAREWELL
        while self.rank == 0 and count < others and time.monotonic() < end:
            time.sleep(0.05)
            count = int(self.store.get(f"{key}/left"))

    def lost(self, what: str, error: StoreLost) -> RankError:
        """The error where the store does not answer."""
        holder = self.store.holder
        who = f"{holder}, which holds the job's store," if holder else "the job's store"
        return RankError(f"{what}: {who} did not answer", where=str(error), hint=LOOK, restart=True)

    def collect(self, topic: str, mine: str) -> list[str]:
        """The texts of all ranks, in their order; all of them call it.

        Raises:
            RankError: a rank did not come in time, or the store is gone.
        """
        told = f"{topic}/{self._counts.get(topic, 0) + 1}/told"
        self.tell(told, mine)
        found: list[str] = json.loads(self.agree(topic, "", lambda: json.dumps(self.told(told))))
        return found

    def tell(self, topic: str, mine: str) -> None:
        """Leave a text for rank 0, before a call of `agree` in which it decides by all of them.

        Raises:
            RankError: the store is gone.
        """
        try:
            self.store.set(f"{topic}/{self.rank}", mine)
        except StoreLost as error:
            raise self.lost(f"{topic} could not be told", error) from error

    def told(self, topic: str) -> list[str]:
        """What every rank has told, in the order of ranks.

        Raises:
            RankError: the store is gone.
        """
        try:
            return [self.store.get(f"{topic}/{rank}") for rank in range(self.size)]
        except StoreLost as error:
            raise self.lost(f"{topic} could not be read", error) from error

    def missing(
        self, topic: str, note: str, grace: float, among: Sequence[int] | None = None
    ) -> list[int]:
        """Ranks that do not report within `grace` seconds that they failed, or wait, too.

        The first rank to know publishes it for all, so that none of them takes another one that has
        left meanwhile for missing.

        Args:
            topic: equal on all ranks.
            note: what this rank reports; others have it by `note`.
            grace: seconds.
            among: of whom it asks; by default all.

        Raises:
            StoreLost: the store is gone.
        """
        store, end = self.store, time.monotonic() + grace
        store.set(f"{topic}/{self.rank}", note, grace)
        store.set(f"{topic}/any", note, grace)
        asked = range(self.size) if among is None else among
        while True:
            left = max(end - time.monotonic(), 0.5)
            if among is None and store.has(f"{topic}/missing", left):
                absent = [int(r) for r in store.get(f"{topic}/missing", left).split()]
                break
            absent = [
                r
                for r in asked
                if not (store.has(f"{topic}/{r}", left) or store.has(f"{topic}/waits/{r}", left))
            ]
            if not absent or time.monotonic() > end:
                if among is None:
                    store.set(f"{topic}/missing", " ".join(map(str, absent)), left)
                break
            time.sleep(0.05)
        if among is None:
            self._leave(topic, self.size - len(absent))
        return absent

    def note(self, topic: str, rank: int) -> str:
        """What a rank has reported that is not missing."""
        if self.store.has(f"{topic}/{rank}"):
            return f"had failed before, as {self.store.get(f'{topic}/{rank}')}"
        return f"waits itself, or {self.store.get(f'{topic}/waits/{rank}')}"


def ranks(numbers: list[int]) -> str:
    """``"rank 3"``, ``"ranks 3, 5 and 9 more"``."""
    shown = ", ".join(map(str, numbers[:4]))
    more = f" and {len(numbers) - 4} more" if len(numbers) > 4 else ""
    return f"rank{'s' if len(numbers) > 1 else ''} {shown}{more}"


def _difference(topic: str, rank: int, reference: str, mine: str) -> str:
    theirs, ours = reference.splitlines(), mine.splitlines()
    for left, right in zip(theirs, ours, strict=False):
        if left != right:
            return f"the {topic} differ: rank 0 has {left!r} where rank {rank} has {right!r}"
    extra, owner = (theirs, 0) if len(theirs) > len(ours) else (ours, rank)
    first = extra[min(len(theirs), len(ours))]
    return f"the {topic} of ranks 0 and {rank} differ: only rank {owner} has {first!r}"
