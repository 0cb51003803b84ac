"""The best few sizes for a histogram of lengths: an exact dynamic programme."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from itertools import accumulate


def best_sizes(
    sizes: Sequence[int], counts: Sequence[int]
) -> Iterator[tuple[int, tuple[int, ...]]]:
    """For 1, 2, ... chosen sizes: the positions that all examples take, and the sizes.

    An example of size s takes the smallest chosen size that is at least s. With j the index of the
    largest chosen size so far and N(j) the examples up to it, the positions with k sizes are
    ``D_k(j) = min over i < j of D_{k-1}(i) + sizes[j] * (N(j) - N(i))``. As a function of
    ``sizes[j]`` each i is a line of slope -N(i); slopes fall with i and sizes rise with j, so the
    lower envelope is walked once: O(m) for each k, with m sizes, in exact integers.

    Args:
        sizes: that may be chosen, rising.
        counts: examples of each size, above 0.

    Yields:
        Positions and chosen sizes, rising; m times, each time fewer positions.
    """
    total = [0, *accumulate(counts)]
    cost = [0, *(s * n for s, n in zip(sizes, total[1:], strict=True))]
    taken: list[array[int]] = []  # per number of sizes beyond one: i by j
    yield cost[-1], (sizes[-1],)
    for k in range(2, len(sizes) + 1):
        cost, origin = _with_one_more(sizes, total, cost, k)
        taken.append(origin)
        chosen, j = [], len(sizes)
        for back in reversed(taken):
            chosen.append(sizes[j - 1])
            j = back[j]
        yield cost[-1], (sizes[j - 1], *reversed(chosen))


def _with_one_more(
    sizes: Sequence[int], total: Sequence[int], before: Sequence[int], k: int
) -> tuple[list[int], array[int]]:
    """``D_k(j)`` from ``D_{k-1}``, for j >= k, and which i gives it; `before` counts from 1."""
    m = len(sizes)
    cost, origin = [0] * (m + 1), array("i", [0]) * (m + 1)
    hull: list[int] = []  # lines of the lower envelope, from the one that holds for small sizes
    front = 0
    for j in range(k, m + 1):
        new, slope, at = j - 1, total[j - 1], before[j - 1]
        while len(hull) - front >= 2:
            # The last line is nowhere lowest if the new one meets its neighbour before it does.
            last, one = hull[-1], hull[-2]
            if (at - before[one]) * (total[last] - total[one]) > (before[last] - before[one]) * (
                slope - total[one]
            ):
                break
            hull.pop()
        hull.append(new)
        x = sizes[j - 1]
        while front + 1 < len(hull):
            one, two = hull[front], hull[front + 1]
            if before[one] - total[one] * x < before[two] - total[two] * x:
                break
            front += 1
        best = hull[front]
        cost[j] = before[best] + x * (total[j] - total[best])
        origin[j] = best
    return cost, origin
