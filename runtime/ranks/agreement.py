"""All ranks agree, or all of them raise; through the job's key-value store, never a collective.

A collective would hang where one rank does not take part, and that is what has to be found out.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import InitVar, dataclass, field
from datetime import timedelta

from graphopt.errors import RankError
from graphopt.runtime.ranks.notes import Notes
from graphopt.runtime.ranks.silent import refused
from graphopt.runtime.ranks.store import Store, StoreLost

# What is written as the verdict when all is well.
_EQUAL = "equal"

SAME_MODEL = "build the same model with the same passes on all ranks"
# How long one waits for others without a word.
PATIENCE = timedelta(seconds=20)
# A wait is told of after this part of the timeout, if that is sooner.
FRACTION = 0.25
# Seconds between two looks at a wait.
BEAT = 0.5
# Seconds in which ranks may say that they wait elsewhere; those that do have said so before.
GRACE = 2.0
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
        noted: who waits for whom in the whole job; by default these ranks are all.
        members: numbers of these ranks within the job.

    Attributes:
        notes: who waits for whom.
    """

    store: Store
    rank: int
    size: int
    timeout: timedelta
    silences: Store | None = None
    noted: InitVar[Notes | None] = None
    members: Sequence[int] = ()
    notes: Notes = field(init=False)
    _counts: dict[str, int] = field(default_factory=dict)

    def __post_init__(self, noted: Notes | None) -> None:
        self.members = tuple(self.members) or tuple(range(self.size))
        self.notes = noted or Notes(self.store, self.rank, self.size)

    def named(self, numbers: Sequence[int]) -> str:
        """Ranks of this group, in words, by their numbers within the job."""
        return ranks([self.members[number] for number in numbers])

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
            first, here = self.members[0], self.members[self.rank]
            difference = _difference(topic, first, here, store.get(f"{key}/text"), mine)
            store.set(f"{key}/difference", difference)
        store.set(f"{key}/here/{self.rank}", "here")
        if store.add(f"{key}/arrived") == self.size:
            differs = store.has(f"{key}/difference")
            store.set(f"{key}/verdict", store.get(f"{key}/difference") if differs else _EQUAL)
        verdict = self._get(key, "verdict", range(self.size), end)
        if verdict != _EQUAL:
            self.notes.leave(key, self.size)
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
        topic = key.split("/")[0]
        patience = min(PATIENCE.total_seconds(), FRACTION * whole)
        begun, told, noted = time.monotonic(), False, False
        while (found := store.first(keys, min(BEAT, end - time.monotonic()), end)) is None:
            if time.monotonic() >= end:
                break
            waited = time.monotonic() - begun
            if waited >= patience and not told:
                told = True
                log.warning("waiting for %s to agree on %s", self._whom(key, needed), topic)
            self.notes.hear()
            if told or self.notes.alarm:
                noted = True
                self.notes.waits(self._on(key, needed), f"{topic} could not be agreed on")
        if found == keys[0]:
            if noted:
                self.notes.done()
            return store.get(keys[0])
        if found is None:
            store.set(f"{key}/failed", self._late(key, needed, topic))
        text = store.get(f"{key}/failed")
        self.notes.failed(self._on(key, needed), text)
        self.notes.leave(key, self.size - 1)
        raise RankError(
            text,
            hint="call the model on every rank, and look at the output of the missing one",
            restart=True,
        )

    def _late(self, key: str, needed: Sequence[int], topic: str) -> str:
        """Who did not come, or whom those wait for who did not."""
        on, whole = self._on(key, needed), self.timeout.total_seconds()
        text = f"{self._whom(key, needed)} did not come to agree on {topic} within {whole:g} s"
        absent = self._absent(key, needed)
        if self.silences is not None and (said := refused(self.silences, absent)):
            return text + said
        self.notes.failed(on, f"{topic} could not be agreed on")
        found = self.notes.find(on, GRACE)
        if not found.lost or set(found.lost) == set(on):
            return text
        waiting = f"{ranks(on)} {'wait' if len(on) > 1 else 'waits'}"
        return (
            f"{topic} could not be agreed on within {whole:g} s: {ranks(found.lost)} did not "
            f"answer, for which {waiting}"
        )

    def _on(self, key: str, needed: Sequence[int]) -> list[int]:
        """For which ranks of the job one waits."""
        return [self.members[r] for r in self._absent(key, needed) or (0,)]

    def _whom(self, key: str, needed: Sequence[int]) -> str:
        if not needed:
            return self.named([0])
        absent = self._absent(key, needed)
        return self.named(absent) if absent else "another rank"

    def _absent(self, key: str, needed: Sequence[int]) -> list[int]:
        return [r for r in needed if not self.store.has(f"{key}/here/{r}")]

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

    def gathered(self, topic: str, mine: str, grace: float) -> dict[int, str]:
        """What the ranks say that come to the same place within some seconds, by their number.

        Raises:
            StoreLost: the store is gone.
        """
        store, end = self.store, time.monotonic() + grace
        store.set(f"{topic}/{self.rank}", mine, grace)
        others = [r for r in range(self.size) if r != self.rank]
        found = {self.rank: mine}
        while True:
            for rank in others:
                if rank not in found and store.has(f"{topic}/{rank}", grace):
                    found[rank] = store.get(f"{topic}/{rank}", grace)
            if len(found) == self.size or time.monotonic() > end:
                break
            time.sleep(0.05)
        self.notes.leave(topic, self.size)
        return found


def ranks(numbers: Sequence[int]) -> str:
    """``"rank 3"``, ``"ranks 3, 5 and 9 more"``."""
    shown = ", ".join(map(str, numbers[:4]))
    more = f" and {len(numbers) - 4} more" if len(numbers) > 4 else ""
    return f"rank{'s' if len(numbers) > 1 else ''} {shown}{more}"


def _difference(topic: str, first: int, here: int, reference: str, mine: str) -> str:
    theirs, ours = reference.splitlines(), mine.splitlines()
    for left, right in zip(theirs, ours, strict=False):
        if left != right:
            return f"the {topic} differ: rank {first} has {left!r} where rank {here} has {right!r}"
    extra, owner = (theirs, first) if len(theirs) > len(ours) else (ours, here)
    only = extra[min(len(theirs), len(ours))]
    return f"the {topic} of ranks {first} and {here} differ: only rank {owner} has {only!r}"
