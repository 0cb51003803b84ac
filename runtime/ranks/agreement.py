"""All ranks agree, or all of them raise; through the job's key-value store, never a collective.

A collective would hang where one rank does not take part, and that is what has to be found out.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from graphopt.errors import RankError

# What `_verdict` writes when all is well.
_EQUAL = b"equal"


SAME_MODEL = "build the same model with the same passes on all ranks"
# How long one waits for others without a word.
PATIENCE = timedelta(seconds=20)

log = logging.getLogger("graphopt")


@dataclass
class Agreement:
    """Compares texts of all ranks and spreads rank 0's decisions.

    Args:
        store: a `torch.distributed.Store` that all ranks see.
        rank, size: of this process, and their number.
        timeout: how long to wait for the others.
    """

    store: Any
    rank: int
    size: int
    timeout: timedelta
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
            RankError: another rank has another text, or a rank did not come in time.
        """
        count = self._counts[topic] = self._counts.get(topic, 0) + 1
        key = f"{topic}/{count}"
        if self.rank == 0:
            self.store.set(f"{key}/text", mine)
        self.store.set(f"{key}/here/{self.rank}", b"1")
        reference = self._get(key, f"{key}/text").decode()
        if mine != reference:
            self.store.set(f"{key}/difference", _difference(topic, self.rank, reference, mine))
        if self.store.add(f"{key}/arrived", 1) == self.size:
            differs = self.store.check([f"{key}/difference"])
            verdict = self.store.get(f"{key}/difference") if differs else _EQUAL
            self.store.set(f"{key}/verdict", verdict)
        verdict = self._get(key, f"{key}/verdict")
        if verdict != _EQUAL:
            raise RankError(verdict.decode(), hint=hint)
        if self.rank == 0:
            self.store.set(f"{key}/decision", decide())
        return self._get(key, f"{key}/decision").decode()

    def _get(self, key: str, name: str) -> bytes:
        try:
            self._wait(key, name)
        except RuntimeError as error:
            missing = [r for r in range(self.size) if not self.store.check([f"{key}/here/{r}"])]
            raise RankError(
                f"{ranks(missing) if missing else 'a rank'} did not come to agree on "
                f"{key.split('/')[0]} within {self.timeout.total_seconds():g} s",
                hint="call the model on every rank, and look at the output of the missing one",
            ) from error
        found: bytes = self.store.get(name)
        return found

    def _wait(self, key: str, name: str) -> None:
        """Until a text is there; says once whom it waits for."""
        patience = min(PATIENCE, self.timeout)
        try:
            self.store.wait([name], patience)
        except RuntimeError:
            if patience == self.timeout:
                raise
            absent = [r for r in range(self.size) if not self.store.check([f"{key}/here/{r}"])]
            log.warning(
                "waiting for %s to agree on %s",
                ranks(absent) if absent else "another rank",
                key.split("/")[0],
            )
            self.store.wait([name], self.timeout - patience)

    def tell(self, topic: str, mine: str) -> None:
        """Leave a text for rank 0, before a call of `agree` in which it decides by all of them."""
        self.store.set(f"{topic}/{self.rank}", mine)

    def told(self, topic: str) -> list[str]:
        """What every rank has told, in the order of ranks."""
        return [self.store.get(f"{topic}/{rank}").decode() for rank in range(self.size)]

    def missing(
        self, topic: str, note: str, grace: float, among: Sequence[int] | None = None
    ) -> list[int]:
        """Ranks that do not report within `grace` seconds that they failed, too.

        Args:
            topic: equal on all ranks.
            note: what this rank reports; others have it by `note`.
            grace: seconds.
            among: of whom it asks; by default all.
        """
        self.store.set(f"{topic}/{self.rank}", note)
        deadline = time.monotonic() + grace
        asked = range(self.size) if among is None else among
        while True:
            absent = [r for r in asked if not self.store.check([f"{topic}/{r}"])]
            if not absent or time.monotonic() > deadline:
                return absent
            time.sleep(0.05)

    def note(self, topic: str, rank: int) -> str:
        """What a rank has reported that is not missing."""
        found: bytes = self.store.get(f"{topic}/{rank}")
        return found.decode()


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
