"""Histograms of latencies in constant memory, with a known relative error."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field

# Buckets grow by an eighth of a power of two: a quantile is at most 9.1 % above the true one.
PER_DOUBLING = 8


@dataclass
class Histogram:
    """Counts of durations, in seconds, in buckets of geometric width.

    Not synchronised: whoever shares one holds a lock.

    Attributes:
        count: how many durations were added.
        total: their sum, in seconds.
        most: the longest, in seconds; 0 where there is none.
        buckets: how many are in the bucket ``k``, which ends at ``2 ** (k / PER_DOUBLING)``
            microseconds and includes its end.
    """

    count: int = 0
    total: float = 0.0
    most: float = 0.0
    buckets: Counter[int] = field(default_factory=Counter)

    def add(self, seconds: float) -> None:
        """Count one duration; less than a microsecond counts as one."""
        self.count += 1
        self.total += seconds
        self.most = max(self.most, seconds)
        self.buckets[math.ceil(PER_DOUBLING * math.log2(max(1e6 * seconds, 1.0)))] += 1

    def quantile(self, q: float) -> float:
        """The duration, in seconds, that a share `q` of all does not exceed; 0 if there is none.

        Rounded up to the end of its bucket, and never above the longest one.
        """
        rank, seen = max(1, math.ceil(q * self.count)), 0
        for bucket in sorted(self.buckets):
            seen += self.buckets[bucket]
            if seen >= rank:
                return min(1e-6 * 2 ** (bucket / PER_DOUBLING), self.most)
        return 0.0

    def copy(self) -> Histogram:
        """The same counts, which change no more."""
        return Histogram(self.count, self.total, self.most, self.buckets.copy())

    def to_json(self) -> dict[str, float]:
        """Count, and mean, median, 90th and 99th percentile and maximum in milliseconds."""
        mean = self.total / self.count if self.count else 0.0
        quantiles = {f"p{round(100 * q)}": self.quantile(q) for q in (0.5, 0.9, 0.99)}
        times = {"mean": mean, **quantiles, "max": self.most}
        return {"count": self.count, **{f"{k}_ms": round(1e3 * v, 3) for k, v in times.items()}}
