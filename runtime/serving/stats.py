"""What became of the requests to one dispatcher, and how long they took."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass, field, replace

from graphopt.runtime.serving.latency import Histogram


@dataclass
class Stats:
    """Counts since the start.

    Each accepted request is in exactly one of `answered`, `failed`, `expired`, `cancelled`,
    `abandoned`, or still under way.

    Attributes:
        accepted: requests that came into the queue, or that wait for room in it; one that is about
            to be refused is counted for that moment.
        refused: requests for which there was no room.
        answered: requests that got the model's answer.
        failed: requests for which the model raised.
        expired: requests past their deadline, computed or not.
        cancelled: requests taken back before they ran.
        abandoned: requests that were still queued when the dispatcher ended without draining.
        batches: how many batches ran, by their size with padding; batches that raised included.
        padding: rows of these batches that belong to no request.
        retries: batches that raised and were run again in halves.
        queueing: from a request's arrival to the start of its batch.
        compute: from the start of its batch to the answer.
        latency: from arrival to answer.
    """

    accepted: int = 0
    refused: int = 0
    answered: int = 0
    failed: int = 0
    expired: int = 0
    cancelled: int = 0
    abandoned: int = 0
    batches: Counter[int] = field(default_factory=Counter)
    padding: int = 0
    retries: int = 0
    queueing: Histogram = field(default_factory=Histogram)
    compute: Histogram = field(default_factory=Histogram)
    latency: Histogram = field(default_factory=Histogram)

    @property
    def under_way(self) -> int:
        """Requests that are queued or computed now."""
        ended = self.answered + self.failed + self.expired + self.cancelled + self.abandoned
        return self.accepted - ended

    def to_json(self) -> dict[str, object]:
        """As plain data; latencies in milliseconds."""
        names = ("accepted", "refused", "answered", "failed", "expired", "cancelled", "abandoned")
        counts = {name: getattr(self, name) for name in (*names, "under_way", "retries", "padding")}
        batches = {str(size): n for size, n in sorted(self.batches.items())}
        times = {name: getattr(self, name).to_json() for name in ("queueing", "compute", "latency")}
        return {**counts, "batches": batches, **times}


class Recorder:
    """Stats that several threads write."""

    def __init__(self) -> None:
        self._stats = Stats()
        self._lock = threading.Lock()

    def count(self, what: str, number: int = 1) -> None:
        """Add to one of the plain counts."""
        with self._lock:
            setattr(self._stats, what, getattr(self._stats, what) + number)

    def batch(self, size: int, requests: int) -> None:
        """A batch of this size runs, for so many requests."""
        with self._lock:
            self._stats.batches[size] += 1
            self._stats.padding += size - requests

    def answered(self, entered: float, started: float, ended: float) -> None:
        """A request was answered; times of one clock, in seconds."""
        with self._lock:
            self._stats.answered += 1
            self._stats.queueing.add(started - entered)
            self._stats.compute.add(ended - started)
            self._stats.latency.add(ended - entered)

    def stats(self) -> Stats:
        """A copy of what was counted so far."""
        with self._lock:
            s = self._stats
            return replace(
                s,
                batches=s.batches.copy(),
                queueing=s.queueing.copy(),
                compute=s.compute.copy(),
                latency=s.latency.copy(),
            )
