"""Sizes that examples are padded to."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeGuard

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from graphopt.data.histogram import best_sizes
from graphopt.errors import ArgumentError

FURTHER = 4
"""Where `k` sizes are not enough, how many times as many are tried, to say what is."""

Lengths: TypeAlias = Sequence[int] | NDArray[Any] | Tensor


@dataclass(frozen=True)
class Buckets:
    """A few sizes; an example is padded to the smallest one that is at least its length.

    Attributes:
        sizes: in positions, rising.

    Raises:
        ArgumentError: there are none, or they are no rising whole numbers above 0.
    """

    sizes: tuple[int, ...]

    def __post_init__(self) -> None:
        whole = all(is_whole(size) and size >= 1 for size in self.sizes)
        if not (self.sizes and whole and all(a < b for a, b in itertools.pairwise(self.sizes))):
            raise ArgumentError(
                f"sizes={self.sizes!r} are no rising whole numbers above 0",
                hint="pass such as Buckets((64, 128, 256)), or have bucket(lengths, k=3) choose",
            )
        object.__setattr__(self, "sizes", tuple(map(int, self.sizes)))

    def size_of(self, length: int) -> int:
        """What one example of that length is padded to.

        Raises:
            ArgumentError: the length is above the largest size, below 1 or no whole number.
        """
        if not is_whole(length):
            raise _no_length(length)
        return self.sizes[int(self.which([length])[0])]

    def which(self, lengths: Lengths) -> NDArray[np.int64]:
        """For each example the index of its size.

        Raises:
            ArgumentError: a length is above the largest size, below 1 or no whole number.
        """
        whole = whole_lengths(lengths)
        if len(whole) and whole.max() > self.sizes[-1]:
            index = int(np.argmax(whole > self.sizes[-1]))
            raise ArgumentError(
                f"length {whole[index]} is above the largest size, {self.sizes[-1]}",
                where=f"lengths[{index}]",
                hint="count the lengths of all data when sizes are chosen, or cut examples to "
                "the largest size",
            )
        return np.searchsorted(np.asarray(self.sizes), whole)

    def padding(self, lengths: Lengths) -> float:
        """Share of all positions of these examples, each padded to its size, that is padding.

        Raises:
            ArgumentError: as in `which`.
        """
        padded = np.asarray(self.sizes, dtype=np.int64)[self.which(lengths)].sum()
        return share(int(whole_lengths(lengths).sum()), int(padded))

    def report(self, lengths: Lengths) -> str:
        """A line for all of these examples, and one for each size.

        Raises:
            ArgumentError: as in `which`.
        """
        whole, index = whole_lengths(lengths), self.which(lengths)
        count = len(self.sizes)
        examples = np.bincount(index, minlength=count)
        true = np.zeros(count, dtype=np.int64)
        np.add.at(true, index, whole)
        lines = [
            f"{count} {'size' if count == 1 else 'sizes'} for {len(whole)} examples: "
            f"{self.padding(whole):.1%} padding"
        ]
        wide = len(str(self.sizes[-1]))
        for size, n, positions in zip(self.sizes, examples, true, strict=True):
            padding = share(int(positions), size * int(n))
            what = "example" if n == 1 else "examples"
            lines.append(f"  {size:>{wide}}: {n} {what}, {padding:.1%} padding")
        return "\n".join(lines)


def bucket(
    lengths: Lengths, *, k: int | None = None, padding: float | None = None, multiple: int = 1
) -> Buckets:
    """The sizes that waste the least on these examples, or the fewest that waste little enough.

    Exact. Time and memory are O(m) for each size that is chosen, with m different lengths.

    Args:
        lengths: of all examples, in positions.
        k: sizes, at most.
        padding: the share of all positions that may be padding, above 0 and below 1. Without `k` as
            many sizes are taken as that needs, with `k` at most so many.
        multiple: of which all sizes are multiples.

    Returns:
        As few sizes as reach `padding`; without it, the `k` sizes with the least padding, or one
        for each length if there are fewer lengths. The largest takes the longest example.

    Raises:
        ArgumentError: there is no example, a length is below 1 or no whole number, an argument is
            out of range, or the share cannot be reached.
    """
    if k is None and padding is None:
        raise ArgumentError(
            "neither the number of sizes nor a share of padding is given",
            hint="pass k=4, or padding=0.1",
        )
    for name, value in (("k", k), ("multiple", multiple)):
        if value is not None and not (is_whole(value) and value >= 1):
            raise ArgumentError(f"{name}={value!r} is no whole number above 0", hint="pass 1, 2, …")
    if padding is not None and not (_is_number(padding) and 0 < padding < 1):
        raise ArgumentError(
            f"padding={padding!r} is no share between 0 and 1",
            hint="pass 0.1 for one padded position of ten",
        )
    whole = whole_lengths(lengths)
    if not len(whole):
        raise ArgumentError("there are no lengths", hint="pass one length per example")
    true = int(whole.sum())
    rounded, counts = np.unique(-(-whole // multiple) * multiple, return_counts=True)
    found = best_sizes(rounded.tolist(), counts.tolist())
    if padding is None:
        *_, (_, sizes) = itertools.islice(found, k)
        return Buckets(sizes)
    least = share(true, int((rounded * counts).sum()))
    if least > padding:
        raise ArgumentError(
            f"sizes that are multiples of {multiple} leave {least:.3g} of all positions as "
            f"padding, above padding={padding}",
            hint="use a smaller multiple, or allow more padding",
        )
    reached = 1.0
    for number, (positions, sizes) in enumerate(found, 1):
        left = share(true, positions)
        if left <= padding and (k is None or number <= k):
            return Buckets(sizes)
        if k is None:
            continue
        if number == k:
            reached = left
        if left <= padding or number == FURTHER * k:
            break
    enough = f"it takes k={number}" if left <= padding else f"it takes more than k={number}"
    raise ArgumentError(
        f"{k} {'size leaves' if k == 1 else 'sizes leave'} {reached:.3g} of all positions as "
        f"padding, above padding={padding}",
        hint=enough,
    )


def share(true: int, positions: int) -> float:
    """Which part of all positions is padding; 0 of none."""
    return (positions - true) / positions if positions else 0.0


def whole_lengths(lengths: Lengths) -> NDArray[np.int64]:
    """Lengths as an array.

    Raises:
        ArgumentError: they are no sequence of whole numbers above 0; names the first that is none.
    """
    try:
        values = np.asarray(lengths.cpu() if isinstance(lengths, Tensor) else lengths)
    except ValueError:  # rows of several lengths
        values = np.empty((0, 0))
    if values.ndim != 1:
        raise ArgumentError(
            "lengths are no flat list of numbers",
            hint="pass one length per example, such as [len(x) for x in data]",
        )
    if not len(values):
        return np.zeros(0, dtype=np.int64)
    if values.dtype.kind not in "iu":
        bad = (i for i, value in enumerate(lengths) if not is_whole(value))
        index = next(bad, 0)
        raise _no_length(lengths[index], index)
    if values.min() < 1:
        index = int(np.argmin(values))
        raise _no_length(values[index].item(), index)
    return values.astype(np.int64)


def _no_length(value: object, index: int | None = None) -> ArgumentError:
    empty = is_whole(value) and value == 0
    return ArgumentError(
        f"{value!r} is no length: lengths are whole numbers above 0",
        where="" if index is None else f"lengths[{index}]",
        hint="leave empty examples out" if empty else "pass the number of positions",
    )


def is_whole(value: object) -> TypeGuard[int]:
    """Whether it is a whole number, of Python or NumPy."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float | np.floating) and not isinstance(value, bool)
