"""The time of one collective as a function of its size."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Curve:
    """A non-decreasing, piecewise linear cost: bytes to seconds.

    Attributes:
        points: ``(bytes, seconds)``, both non-decreasing, bytes strictly; below the first point
            the cost is that of the first, above the last it continues with the last slope.
        source: where it comes from, in a few words.
        joining: seconds per byte for copying several gradients into one buffer before it is sent; a
            message of one gradient needs none.
    """

    points: tuple[tuple[float, float], ...]
    source: str = ""
    joining: float = 0.0

    def __post_init__(self) -> None:
        sizes = [size for size, _ in self.points]
        times = [time for _, time in self.points]
        if not sizes or times != sorted(times) or any(a >= b for a, b in pairwise(sizes)):
            raise ValueError(f"a cost curve must not decrease: {self.points}")

    @classmethod
    def affine(cls, latency: float, per_byte: float, source: str = "") -> Curve:
        """``latency + per_byte * bytes``, in seconds and seconds per byte."""
        far = 2.0**30  # about the size of large messages, which keeps the slope precise
        return cls(((0.0, latency), (far, latency + far * per_byte)), source)

    def __call__(self, size: float) -> float:
        """Seconds that a message of `size` bytes takes."""
        points = self.points
        index = bisect_right(points, size, key=lambda p: p[0])
        if index == 0 or len(points) == 1:
            return points[0][1]
        left, right = points[index - 1 : index + 1] if index < len(points) else points[-2:]
        slope = (right[1] - left[1]) / (right[0] - left[0])
        return left[1] + slope * (size - left[0])


def of_group(cost: Callable[[float], float], size: float, members: int) -> float:
    """Seconds that a message of so many gradients takes, copied together and sent."""
    joining: float = getattr(cost, "joining", 0.0)
    return cost(size) + (joining * size if members > 1 else 0.0)


def fit(samples: Iterable[tuple[float, float]], source: str = "") -> Curve:
    """The non-decreasing curve nearest to measured ``(bytes, seconds)``, by medians per size.

    Pools neighbours that would decrease (isotonic regression), so one slow outlier cannot make a
    larger message look cheaper than a smaller one.
    """
    by_size: dict[float, list[float]] = {}
    for size, seconds in samples:
        by_size.setdefault(size, []).append(seconds)
    blocks: list[tuple[list[float], float]] = []
    for size in sorted(by_size):
        times = sorted(by_size[size])
        blocks.append(([size], times[len(times) // 2]))
        while len(blocks) > 1 and blocks[-2][1] > blocks[-1][1]:
            (right, b), (left, a) = blocks.pop(), blocks.pop()
            mean = (a * len(left) + b * len(right)) / (len(left) + len(right))
            blocks.append((left + right, mean))
    return Curve(tuple((size, time) for sizes, time in blocks for size in sizes), source)
